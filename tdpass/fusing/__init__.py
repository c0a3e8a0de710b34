"""Which chains of layers are worth one operator, whichever front end finds them."""
