"""Speculative decoding: drafters guess how sequences go on, the target verifies all guesses of a step at once."""
