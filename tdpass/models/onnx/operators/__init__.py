"""The operators that are written into graphs, and the runtime that knows them."""
