"""A Ray cluster's job server, over nothing but its HTTP port (the dashboard's, 8265).

Token authentication is Ray's own: with RAY_AUTH_MODE=token every request carries the token of
RAY_AUTH_TOKEN, of the file that RAY_AUTH_TOKEN_PATH names, or of ~/.ray/auth_token.
https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

import asyncio
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adq.quant.errors import InputError

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
PATIENCE_S = 60.0
"""How long a job server that was there may be gone before its log is given up."""

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class _UnwrittenError(Exception):
    """A log could not be passed on, which is no fault of the connection; the cause says why."""


@dataclass(frozen=True)
class Job:
    """What the job server knows of a job; times are seconds since 1970."""

    id: str
    status: str
    command: str
    started: float | None
    ended: float | None
    message: str
    exit_code: int | None
    metadata: Mapping[str, str]

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "metadata": dict(self.metadata)}


def job_server_url(address: str | None) -> str:
    """`address`, or what the environment names as one, as a URL without a slash at its end."""
    named, where = address, "address"
    if named is None:
        for name in ADDRESSES:
            if os.environ.get(name, "").startswith(("http://", "https://")):
                named, where = os.environ[name], name
                break
    wanted = "the cluster's job server like http://HEAD:8265"
    if named is None:
        raise InputError(f"address: expected {wanted}, in --address or RAY_API_SERVER_ADDRESS")
    if not re.fullmatch(r"https?://[^/?#\s]+/*", named):
        hint = " (HOST:6379 is the address for workers)" if named.endswith(":6379") else ""
        raise InputError(f"{where}: expected {wanted}, got {named!r}{hint}")
    return named.rstrip("/")


class JobServer:
    """Sends, lists, follows and stops jobs. Raises InputError when the server can't be used."""

    def __init__(self, address: str | None) -> None:
        self.url = job_server_url(address)
        self._greet()
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise InputError(
                f"Ray cannot be used here ({error}): install adq-search again"
            ) from None
        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        kept = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
        try:  # which Ray would take instead of ours
            with self._errors():
                self._client = JobSubmissionClient(self.url)
        finally:
            os.environ.update(kept)

    def _greet(self) -> None:
        """See that a job server is there, within seconds: Ray's own client would wait for long."""
        try:
            with urllib.request.urlopen(f"{self.url}/api/version", timeout=10) as answer:
                json.load(answer)["ray_version"]
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):
                raise InputError(f"{self.url} is no Ray job server: it answers {error}") from None
        except (ValueError, KeyError, TypeError, http.client.HTTPException):
            raise InputError(
                f"{self.url} is no Ray job server: expected the head's dashboard, by default on "
                "port 8265"
            ) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"cannot reach a Ray job server at {self.url} ({reason}): is the head up, does it "
                "serve other machines (ray start --head --dashboard-host=0.0.0.0), and does the "
                "network let this port through?"
            ) from None

    @contextmanager
    def _errors(self, job: str | None = None) -> Iterator[None]:
        """Ray's errors, each as one line that says what to do."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except InputError:
            raise
        except AuthenticationError as error:
            raise InputError(_about_token(self.url, str(error))) from None
        except OSError as error:  # also those of requests
            raise InputError(f"lost the job server at {self.url}: {_last_line(error)}") from None
        except (RuntimeError, ValueError) as error:
            text = str(error)
            if job is not None and "status code 404" in text:
                raise InputError(
                    f"no job {job!r} at {self.url}: 'adq-search status' lists those there are"
                ) from None
            raise InputError(f"the job server at {self.url} refused: {_last_line(error)}") from None

    def submit(
        self,
        command: str,
        job_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
        cpus: float | None = None,
        gpus: float | None = None,
    ) -> str:
        """Start a job on the head node, or with `gpus` where there are so many; returns its id.

        With `cpus` or `gpus` it sees the GPUs that it asked for, without either all of the head's.
        """
        head = {"node:__internal_head__": 0.001} if cpus and not gpus else None
        with self._errors():
            return self._client.submit_job(
                entrypoint=command,
                submission_id=job_id,
                runtime_env=runtime_env,
                metadata=metadata,
                entrypoint_num_cpus=cpus or None,
                entrypoint_num_gpus=gpus or None,
                entrypoint_resources=head,
            )

    def jobs(self) -> list[Job]:
        """All jobs that were submitted, the latest first."""
        with self._errors():
            found = [_job(each) for each in self._client.list_jobs() if each.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0, reverse=True)

    def job(self, id: str) -> Job:
        with self._errors(id):
            return _job(self._client.get_job_info(id))

    def log(self, id: str) -> str:
        with self._errors(id):
            return self._client.get_job_logs(id)

    def stop(self, id: str) -> bool:
        """Ask a job to end; False where it has ended already."""
        with self._errors(id):
            return not self.job(id).has_ended and self._client.stop_job(id)

    def delete(self, id: str) -> None:
        """Take an ended job off the list."""
        with self._errors(id):
            self._client.delete_job(id)

    def follow(self, id: str, write: Callable[[str], None]) -> Job:
        """Pass on the job's log as it grows, until the job has ended; returns how it ended.

        A connection that breaks is made again, and the log goes on where it was. What `write`
        raises passes.
        """
        seen = 0
        lost: float | None = None  # since when nothing answers

        async def tail() -> None:
            nonlocal seen, lost
            at = 0
            async for text in self._client.tail_job_logs(id):
                lost = None
                new = text[max(seen - at, 0) :]
                at += len(text)
                seen = max(seen, at)
                try:
                    if new:
                        write(new)
                except Exception as error:
                    raise _UnwrittenError from error

        job = self.job(id)
        while True:
            failure: Exception | None = None
            began = time.monotonic()
            try:
                asyncio.run(tail())
                job, lost = self.job(id), None
            except _UnwrittenError as error:
                raise error.__cause__ or error from None
            except (RuntimeError, OSError, TimeoutError, InputError) as error:
                failure = error  # aiohttp's are OSErrors, or RuntimeErrors of Ray about them
            except Exception as error:  # aiohttp has errors of other kinds
                if not type(error).__module__.startswith("aiohttp"):
                    raise
                failure = error
            if failure is None and job.has_ended:
                return job
            if failure is not None:
                now = time.monotonic()
                # a connection may have held for long without a word of the job
                held = now - began > PATIENCE_S and not isinstance(failure, TimeoutError)
                if lost is None or held:
                    lost = now
                if now - lost > PATIENCE_S:
                    raise InputError(
                        f"lost the job server at {self.url} ({_last_line(failure)}): if the head "
                        f"still lives, so does the job: 'adq-search logs {id} --follow'"
                    )
            time.sleep(1)


def _job(details: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1000

    return Job(
        id=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        command=details.entrypoint,
        started=seconds(details.start_time),
        ended=seconds(details.end_time),
        message=details.message or "",
        exit_code=details.driver_exit_code,
        metadata=details.metadata or {},
    )


def _last_line(error: object) -> str:
    """What stands at the end of an error that may hold a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else type(error).__name__


def _about_token(url: str, refused: str) -> str:
    mode, path = os.environ.get("RAY_AUTH_MODE", ""), os.environ.get("RAY_AUTH_TOKEN_PATH")
    places = "RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
    how = f"set RAY_AUTH_MODE=token, and have the token in {places} ('ray get-auth-token' prints "
    how += "the head's)"
    if mode.lower() != "token":
        return f"the cluster at {url} wants a token: {how}"
    source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else path or "~/.ray/auth_token"
    there = os.environ.get("RAY_AUTH_TOKEN") or _has_text(
        Path(path) if path else Path.home() / ".ray" / "auth_token"
    )
    if not there:
        return f"the cluster at {url} wants a token, and there is none in {source}: {how}"
    if "invalid" not in refused.lower():
        return f"the token in {source} cannot be used ({_last_line(refused)}): {how}"
    return f"the cluster at {url} refuses the token in {source}: it must be the head's own; {how}"


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except (OSError, UnicodeDecodeError):
        return False
