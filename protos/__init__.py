"""The wire and the vocabulary: generated stubs, frozen messages, the error tree, and conversion between them.

Nothing here imports ray, torch or vllm, nor any other package of the project.
"""
