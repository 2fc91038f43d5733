"""Maps methods to their reference functions, each of which registers itself where it is defined."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Formula:
    """A function that computes a method.

    Attributes:
        function: takes the sources, then the statistics if the method needs them. Keyword arguments
            are the parameters and, if it has them, `base_N`, `w_S`, `key` and `dtype`.
        arguments: argument → the parameter passed as it, or a constant. All other parameters are
            arguments of the same name.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, object]

    def __call__(self, *args: Any, parameters: Mapping[str, Any], **others: Any) -> Any:
        """The result; of `others`, the function gets those that it has an argument for."""
        taken = inspect.signature(self.function).parameters
        named: dict[str, Any] = {k: value for k, value in others.items() if k in taken}
        renamed = {value: key for key, value in self.arguments.items() if isinstance(value, str)}
        named |= {k: v for k, v in self.arguments.items() if not isinstance(v, str)}
        named |= {renamed.get(name, name): value for name, value in parameters.items()}
        return self.function(*args, **named)


FORMULAS: dict[str, Formula] = {}


def computes(method: str, **arguments: object) -> Callable[[Function], Function]:
    """Registers a function under the name of a method; see `Formula` for the arguments."""

    def register(function: Function) -> Function:
        assert method not in FORMULAS, method
        FORMULAS[method] = Formula(function, arguments)
        return function

    return register
