"""Error messages for invalid bodies and unknown routes."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from smolstack.serve.error_responses import RefusedError
from smolstack.serve.parsing import TooDeepError, line_and_column
from smolstack.serve.request_fields import ALIASES, HARMLESS, NEUTRAL, nearest, sent_names

# Instead of pydantic's messages that speak of Python.
_MESSAGES = dict.fromkeys(
    ("dict_type", "mapping_type", "model_type", "model_attributes_type"), "expected an object"
)
# The last step of their location is a field of the body, and not the name of a union's type.
_OF_FIELDS = ("missing", "extra_forbidden")


def add_handlers(app: FastAPI) -> None:
    """Return validation and routing errors as one sentence, in OpenAI's format."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # A union reports errors for all of its types. The intended type is probably the one with
        # the deepest error, and not one whose own type is wrong. An unknown field is probably a
        # misspelled name, and more informative than a missing field.
        first = max(
            error.errors(),
            key=lambda each: (
                len(each["loc"]),
                not str(each["type"]).endswith("_type"),
                each["type"] == "extra_forbidden",
            ),
        )
        if first["type"] == "json_invalid":
            return RefusedError(400, _json_error(first, error.body)).response()
        param = ".".join(_path_of(first, error.body)) or None
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            fields = _fields(request.scope.get("route"))
            return RefusedError(
                400, _unknown_field(name, param, first, fields), param=param
            ).response()
        where = f"{param}: " if param else ""
        said = _MESSAGES.get(first["type"]) or str(first["msg"]).removeprefix("Value error, ")
        return RefusedError(400, f"{where}{said}"[:500], param=param).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        detail = str(error.detail)
        if isinstance(error.__cause__, TooDeepError):
            place = error.__cause__.place
            detail = f"the body cannot be parsed: it is nested too deeply at {place}"
        asked = f"{request.method} {request.url.path[:100]}"
        if error.status_code == 404:
            detail = f"no route {asked}; the routes are {_routes(app)}"
        elif error.status_code == 405:
            allowed = Headers(error.headers or {}).get("allow", "another method")
            detail = f"{asked} is not supported, expected the method {allowed}"
        return RefusedError(error.status_code, detail, headers=error.headers or {}).response()


def _json_error(found: Mapping[str, Any], body: Any) -> str:
    """Return why and where a body is not valid JSON."""
    why = str(found.get("ctx", {}).get("error", "it cannot be parsed")).removesuffix(" at")
    place = found["loc"][-1]
    if not isinstance(body, str) or not isinstance(place, int):
        return f"the body is not valid JSON: {why}"
    return f"the body is not valid JSON: {why} at {line_and_column(body, place)}"


def _path_of(found: Mapping[str, Any], body: Any) -> list[str]:
    """Return the path of an error's value in the body, without the names of a union's types."""
    steps, names = tuple(found["loc"][1:]), sent_names(body)
    if steps and steps[0] in names:
        steps = (*names[steps[0]].split("."), *steps[1:])
    if found["type"] not in _OF_FIELDS:
        return _longest(steps, body) or []
    if found["type"] == "missing":
        steps, *last = steps[:-1], str(steps[-1])
        return [*(_longest(steps, body) or []), *last]
    return _longest(steps, body, whole=True) or [*map(str, steps)]


def _longest(steps: Sequence[Any], value: Any, *, whole: bool = False) -> list[str] | None:
    """Return the longest path in a value that consists of some of the steps, in their order.

    The others are names of a union's types, which may be names of fields as well.

    Args:
        whole: whether the last step is part of the path; None is returned if it cannot be.
    """
    if not steps:
        return []
    first, rest = steps[0], steps[1:]
    without = None if whole and not rest else _longest(rest, value, whole=whole)
    listed = isinstance(value, list) and isinstance(first, int) and 0 <= first < len(value)
    if not listed and not (isinstance(value, Mapping) and first in value):
        return without
    after = _longest(rest, value[first], whole=whole)
    if after is None or (without is not None and len(without) > len(after) + 1):
        return without
    return [str(first), *after]


def _unknown_field(name: str, param: str | None, found: Mapping[str, Any], fields: set[str]) -> str:
    """Return the error message for an unsupported or unknown field."""
    if name in NEUTRAL and param == name:
        return f"{name} is not supported (found {found['input']!r:.60}); leave it out"
    known = {*NEUTRAL, *HARMLESS, *ALIASES, *fields} - {name}
    return f"{param or name}: no such field{nearest(name, known)}"


def _fields(route: Any) -> set[str]:
    """Return the names of all fields of a route's body and its nested objects."""
    body = getattr(route, "body_field", None)
    found: set[type[BaseModel]] = set()
    if body is not None:
        _find_models(body.field_info.annotation, found)
    return {field.alias or name for model in found for name, field in model.model_fields.items()}


def _find_models(annotation: Any, found: set[type[BaseModel]]) -> None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation not in found:
            found.add(annotation)
            for field in annotation.model_fields.values():
                _find_models(field.annotation, found)
        return
    for part in typing.get_args(annotation):
        _find_models(part, found)


def _routes(app: FastAPI) -> str:
    paths = {
        f"{method} {route.path}"
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods or ()
    }
    return ", ".join(sorted(paths))
