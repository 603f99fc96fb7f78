"""Which fields of a config an engine's source reads."""

import ast


def fields_read(source: str) -> set[str]:
    """Config fields a model file reads: config.x, self.config.x and getattr(config, "x")."""

    def is_config(node: ast.expr) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr == "config" and isinstance(node.value, ast.Name) and node.value.id == "self"
        return isinstance(node, ast.Name) and node.id in ("config", "config_")

    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_config(node.value) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            if is_config(node.args[0]) and isinstance(node.args[1], ast.Constant):
                found.add(str(node.args[1].value))
    return found
