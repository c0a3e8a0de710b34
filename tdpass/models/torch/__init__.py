"""The torch front end: module surgery, fx graphs and exported programs."""
