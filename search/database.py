"""Optuna's storage in an SQL database, with trials that are made once and with few statements."""

import copy
import json
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial
from sqlalchemy import URL, insert, make_url
from sqlalchemy.orm import Session

from adq.quant.errors import InputError
from adq.search.journal import JOB
from adq.search.patience import reason
from adq.search.storage_url import shown

SQLITE_WAIT_S = 20.0


def open_database(url: str) -> BaseStorage:
    """The storage behind a URL of SQLAlchemy's, its finished trials read once only.

    Raises InputError for a storage of another version of Optuna.
    """
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    # Optuna formats the URL with its schema version
    text = parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    try:
        return get_storage(Database(text, _engine_settings(parsed)))
    except RuntimeError as error:  # written by another version of Optuna
        raise InputError(f"storage {shown(url)} cannot be used: {reason(error)}") from None


def _engine_settings(url: URL) -> dict[str, Any]:
    """What SQLAlchemy's engine is told so that a dead server is noticed within a minute."""
    backend = url.get_backend_name()
    connect: dict[str, Any] = {}
    if backend == "sqlite":
        connect = {"timeout": SQLITE_WAIT_S}
    elif backend == "postgresql":
        connect = {
            "application_name": "adq-search",
            "connect_timeout": 10,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60_000,  # ms
        }
    elif backend in ("mysql", "mariadb"):
        connect = {"connect_timeout": 10}
    connect = {key: value for key, value in connect.items() if key not in url.query}
    if backend == "sqlite":
        return {"connect_args": connect}
    return {"connect_args": connect, "pool_pre_ping": True, "pool_size": 2, "max_overflow": 8}


class Database(RDBStorage):
    """Optuna's storage, which makes a trial of one `job` once, with few statements.

    Optuna repeats the creation of a trial whenever the database failed: also where the answer to
    the commit was lost, and not the commit. And it looks up each parameter of each new trial among
    those of all before, most of the driver's time for a network of 20 layers; here it does so once
    for each set of distributions, and then parameters and attributes are written together.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any]) -> None:
        self._unsure: set[str] = set()  # jobs whose trial may have been made
        self._checked: tuple[int, dict[str, Any]] | None = None  # study and distributions
        try:
            super().__init__(url, engine_kwargs)
        except BaseException:
            if hasattr(self, "scoped_session"):
                self.remove_session()
            if hasattr(self, "engine"):
                self.engine.dispose()
            raise

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        made = super()._create_new_trial(study_id, template_trial)
        self._unsure.discard(made.user_attrs.get(JOB, ""))
        return made

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> Any:
        job = None if template_trial is None else template_trial.user_attrs.get(JOB)
        if job is not None and job in self._unsure:
            from optuna.storages._rdb import models  # sets up SQLAlchemy's mapping

            found = (
                session.query(models.TrialModel)
                .join(models.TrialUserAttributeModel)
                .filter(
                    models.TrialModel.study_id == study_id,
                    models.TrialUserAttributeModel.key == JOB,
                    models.TrialUserAttributeModel.value_json == json.dumps(job),
                )
                .one_or_none()
            )
            if found is not None:
                return found
        if job is not None:
            self._unsure.add(job)
        if template_trial is None or self._checked != (study_id, template_trial.distributions):
            made = super()._get_prepared_new_trial(study_id, template_trial, session)
            if template_trial is not None:
                self._checked = study_id, {**template_trial.distributions}
            return made
        bare = copy.copy(template_trial)
        bare.params, bare.distributions, bare.user_attrs, bare.system_attrs = {}, {}, {}, {}
        made = super()._get_prepared_new_trial(study_id, bare, session)
        _write_together(session, int(made.trial_id), template_trial)
        return made


def _write_together(session: Session, trial_id: int, template: FrozenTrial) -> None:
    """Parameters and attributes of a new trial, a statement for each of the tables."""
    from optuna.storages._rdb import models

    kinds = {name: template.distributions[name] for name in template.params}
    rows: dict[Any, list[dict[str, Any]]] = {
        models.TrialParamModel: [
            {
                "param_name": name,
                "param_value": kinds[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(kinds[name]),
            }
            for name, value in template.params.items()
        ],
        models.TrialUserAttributeModel: _attributes(template.user_attrs),
        models.TrialSystemAttributeModel: _attributes(template.system_attrs),
    }
    for model, values in rows.items():
        if values:
            session.execute(insert(model), [{"trial_id": trial_id, **row} for row in values])


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in values.items()]
