"""A live page of the cluster, for people without dashboards."""
