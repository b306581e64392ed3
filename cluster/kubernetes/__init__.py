"""Headwater on Kubernetes: what a cluster lacks, what a deployment changes, how it stands, and how to reach it."""
