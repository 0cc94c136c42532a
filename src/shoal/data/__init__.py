"""Data: in which order samples come, whose turn each is, and the loader that fetches them."""
