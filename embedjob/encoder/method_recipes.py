"""The recipes of one method by role: which of them encodes a text. Needs no torch."""

from collections.abc import Iterator, Mapping

from embedjob.config.recipe import Recipe, Role
from embedjob.errors import ConfigError


class MethodRecipes:
    """An encoder's own recipe, and its method's recipes for other roles."""

    def __init__(self, own: Recipe, others: Mapping[Role, Recipe] | None = None) -> None:
        """Take the recipe of texts whose role is not named, and the others."""
        self.own = own
        self._by_role = {**(others or {}), own.role: own}

    def __iter__(self) -> Iterator[Recipe]:
        """Yield the recipe of each role."""
        return iter(self._by_role.values())

    def of(self, role: Role | None) -> Recipe:
        """Return the recipe of a role, the own for None; ConfigError where there is none."""
        if role is None:
            return self.own
        if role not in self._by_role:
            raise ConfigError(
                f"role: got {role}, but this encoder was loaded for {', '.join(self._by_role)};"
                " give Encoder.from_recipe the recipes of all roles"
            )
        return self._by_role[role]
