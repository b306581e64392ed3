"""Keys and values by page: which pages are free, which are shared, and who holds them."""
