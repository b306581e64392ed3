"""A YAML loader for files that people write: it refuses a key given twice, and takes `off` for the word it is."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from protos.errors import ConfigError

BOOL = "tag:yaml.org,2002:bool"


class StrictLoader(yaml.SafeLoader):
    """Of YAML 1.1, but true and false alone are truth values, as in YAML 1.2: `mode: off` is a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuses a key given twice: YAML would silently keep the last."""
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                raise ConfigError(f"lines {lines[key]} and {line} both give the key `{key}`; keep one")
            lines[key] = line
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
