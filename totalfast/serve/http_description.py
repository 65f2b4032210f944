"""The description of the HTTP interface, OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from totalfast import about
from totalfast.serve.submitted import STATES

_INSTANCE = {
    "type": "object",
    "properties": {"series": {"type": "string"}, "instance": {"type": "string"}},
}

_STORED = {
    "type": ["object", "null"],
    "description": "Where the result was stored by STOW-RS: SeriesInstanceUID and SOPInstanceUID.",
    "properties": {
        "server": {"type": "string"},
        "study": {"type": "string"},
        "instances": {"type": "array", "items": _INSTANCE},
    },
}

RUN = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "state": {"enum": [*STATES]},
        "stage": {"type": "string"},
        "fraction": {"type": "number", "minimum": 0, "maximum": 1},
        "exit_code": {"type": ["integer", "null"]},
        "error": {"type": "string"},
        "has_result": {
            "type": "boolean",
            "description": "Whether /runs/{id}/result has the result; also after a failed push.",
        },
        "series": {
            "type": ["string", "null"],
            "description": "SeriesInstanceUID of the series that was fetched.",
        },
        "stored": _STORED,
        "log": {"type": "array", "items": {"type": "string"}},
    },
}

_FLAG_LIST = {"type": "array", "items": {"type": "string"}, "default": []}

_UID = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)*$", "maxLength": 64}

PATHS = {
    "type": "object",
    "required": ["input", "output"],
    "properties": {
        "input": {"type": "string", "description": "Absolute path on the server."},
        "output": {"type": "string", "description": "Absolute path on the server."},
        "flags": _FLAG_LIST,
    },
}

STUDY = {
    "type": "object",
    "required": ["dicomweb", "study"],
    "additionalProperties": False,
    "properties": {
        "dicomweb": {"type": "string", "description": "Name of a server of --dicomweb."},
        "study": {**_UID, "description": "StudyInstanceUID"},
        "series": {
            **_UID,
            "description": "SeriesInstanceUID. Without it the study must have one CT or MR series "
            "with 4 slices or more.",
        },
        "flags": _FLAG_LIST,
        "push": {
            "type": ["boolean", "string"],
            "default": False,
            "description": "Store the result, DICOM SEG unless the flags name another DICOM type: "
            "true for the same server, or the name of another one.",
        },
    },
}

_FLAGS = {
    "name": "flags",
    "in": "query",
    "description": "Flags of the totalfast command, one per parameter.",
    "schema": {"type": "array", "items": {"type": "string"}},
}

_NAME = {
    "name": "name",
    "in": "query",
    "description": "Name of the uploaded file, such as ct.nii.gz, or dicom.zip for a series.",
    "schema": {"type": "string"},
}

_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}


def description() -> dict[str, Any]:
    """Return the OpenAPI description."""
    run = {"content": {"application/json": {"schema": RUN}}}
    missing = {"404": {"description": "There is no such run, or it was removed."}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "totalfast", "version": about.version()},
        "security": [{"token": []}],
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/health": {"get": _operation("Whether the server is alive", {}, security=[])},
            "/metrics": {"get": _operation("Numbers of runs, for Prometheus", {})},
            "/runs": {
                "post": {
                    **_operation(
                        "Submit a run: a scan as the body, or paths or a study as JSON",
                        {
                            "202": {"description": "Accepted", **run},
                            "400": {"description": "The flags or the body are not valid."},
                            "403": {"description": "A path is outside of the server's folders."},
                            "413": {"description": "The upload is too large."},
                            "503": {"description": "Too many runs are waiting."},
                            "507": {"description": "There is no room for more files."},
                        },
                    ),
                    "parameters": [_NAME, _FLAGS],
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/octet-stream": {},
                            "application/json": {"schema": {"oneOf": [PATHS, STUDY]}},
                        },
                    },
                }
            },
            "/runs/{id}": {
                "parameters": [_ID],
                "get": _operation("State", {"200": {"description": "State", **run}, **missing}),
                "delete": _operation(
                    "Cancel a run, or remove one that has ended and its files",
                    {"200": {"description": "State", **run}, **missing},
                ),
            },
            "/runs/{id}/events": {
                "parameters": [_ID],
                "get": _operation("Server-sent events: fetch, log, progress, push, end", missing),
            },
            "/runs/{id}/result": {
                "parameters": [_ID],
                "get": _operation(
                    "The file, or a zip file of several",
                    {
                        **missing,
                        "409": {"description": "The run is not done."},
                        "507": {"description": "There is no room for a zip file."},
                    },
                ),
            },
        },
    }


def _operation(summary: str, responses: dict[str, Any], **more: object) -> dict[str, Any]:
    answers = {"200": {"description": summary}} if "202" not in responses else {}
    token = {} if "security" in more else {"401": {"description": "The token is missing or wrong."}}
    return {"summary": summary, "responses": {**answers, **token, **responses}, **more}
