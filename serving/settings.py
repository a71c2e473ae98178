"""Where and how wide the service runs. Nothing here changes a score."""

import os
from typing import Annotated, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from wtflow.errors import WTFlowError

PREFIX = "WTFLOW_SERVE_"
Count = Annotated[int, Field(ge=1)]


class ServeSettings(BaseSettings):
    """Read from the environment: `WTFLOW_SERVE_PORT=8001` sets `port`, an empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = "127.0.0.1"
    """Address to listen on: this machine only by default, for there is no authentication."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas: Count = 1
    """Processes a line, each with its own copy of the line's model."""
    replica_cpus: Annotated[float, Field(ge=0)] = 0.1
    """CPUs that Ray books for a replica; a booking places replicas, it does not slow them down."""
    threads: Count = 1
    """Threads a replica computes with."""
    max_batch_size: Count = 8
    """Photographs of a line that are scored together when they arrive together."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 5.0
    """How long the first photograph of a batch waits for others, milliseconds."""
    max_queued: Count = 64
    """Requests that wait for a line before further ones are told 503 `overloaded`."""
    max_body_bytes: Count = 32 * 1024 * 1024
    """Longest request body. A line's own `limits.max_bytes` holds too."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A request whose body is not here by then is told 408 `slow_body`."""
    reply_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A line that has not answered by then is reported as 503 `line_not_ready`."""

    @classmethod
    def from_environment(cls) -> Self:
        """Settings of this process. A value that does not fit, or an unknown name, is a `WTFlowError`."""
        known = {PREFIX + name.upper() for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
        if unknown:
            raise WTFlowError(f"{', '.join(unknown)}: no such setting. Unset it; known: {', '.join(sorted(known))}")
        try:
            return cls()
        except ValidationError as error:
            lines = [
                f"{PREFIX}{'.'.join(map(str, item['loc'])).upper()}: {item['msg']} (found {item['input']!r})"
                for item in error.errors()
            ]
            raise WTFlowError("; ".join(lines) + ". Correct or unset it.") from None
