"""Who uses the cluster, and who is refused."""

from __future__ import annotations

from cluster.dashboards.panel import Board, Filter, Panel, Query, Row
from cluster.dashboards.promql import rate, ratio

TENANT = 'tenant=~"$tenant"'
CALLS, TOKENS = "headwater_tenant_requests_total", "headwater_tenant_tokens_total"
ANSWERED = f'outcome=~"stop|length|ok", {TENANT}'


def _calls(where: str) -> str:
    return rate(CALLS, "tenant", where=where)


def _tokens(kind: str) -> str:
    return rate(TOKENS, "tenant", where=f'kind="{kind}", {TENANT}')


BOARD = Board(
    uid="headwater-tenants",
    title="Headwater / Tenants",
    description="Who uses the cluster. Tokens count when their request ends.",
    filters=(Filter("tenant", CALLS, "tenant"),),
    rows=(
        Row(
            "Tokens",
            (
                Panel(
                    "Prompt and generation",
                    "tokens/s",
                    "While tenants wait, these stand to each other as the weights in the tenants file.",
                    (Query(rate(TOKENS, "tenant", where=f'kind=~"prompt|generation", {TENANT}'), "{{tenant}}"),),
                    kind="stack",
                ),
                Panel(
                    "Generation",
                    "tokens/s",
                    "Tokens made for each.",
                    (Query(_tokens("generation"), "{{tenant}}"),),
                    kind="stack",
                ),
                Panel(
                    "Prompts found in caches",
                    "percentunit",
                    "Share of each tenant's prompt tokens. Tenants do not see each other's prefixes, unless "
                    "isolation is none.",
                    (Query(ratio(_tokens("cached"), _tokens("prompt")), "{{tenant}}"),),
                ),
            ),
        ),
        Row(
            "Calls",
            (
                Panel(
                    "Calls",
                    "requests/s",
                    "Generate and Score calls that ended.",
                    (Query(rate(CALLS, "tenant", where=TENANT), "{{tenant}}"),),
                    kind="stack",
                ),
                Panel(
                    "Calls by outcome",
                    "requests/s",
                    "Of the tenants chosen above. cancelled: their clients give up.",
                    (Query(rate(CALLS, "outcome", where=TENANT), "{{outcome}}"),),
                    kind="stack",
                ),
                Panel(
                    "Without an answer",
                    "percentunit",
                    "Share of calls that ended in anything but stop or length. One tenant alone: it has reached a "
                    "limit "
                    "of its own (Overloaded), or its requests are wrong.",
                    (
                        Query(
                            f"1 - {ratio(_calls(ANSWERED), _calls(TENANT))}",
                            "{{tenant}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)
