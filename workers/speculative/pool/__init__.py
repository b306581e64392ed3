"""The pool: drafters in processes of their own, and how a worker uses them."""
