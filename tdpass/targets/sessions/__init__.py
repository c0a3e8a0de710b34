"""Sessions of runtimes whose libraries are heavy: imported where one is opened, not with the runtimes."""
