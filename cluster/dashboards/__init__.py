"""Grafana dashboards as code: `python -m cluster.dashboards` writes them to deploy/grafana."""
