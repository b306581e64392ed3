"""Which tokens run in the next step: sequences, the step's plan, and the scheduler that makes and applies it."""
