"""The latency model that a configuration names."""

from pathlib import Path

from adq.proxies.latency import (
    DEVICE_SCHEMA,
    TABLE_SCHEMA,
    DeviceDescription,
    LatencyModel,
    LatencyTable,
    Roofline,
    from_callable,
)
from adq.quant.errors import InputError
from adq.quant.files import read_json
from adq.search.config import StudyConfig
from adq.search.task import import_from_here

CODEBOOKS = ("adq", "apot")
"""Weight quantizers whose levels are no multiples of one step: integers cannot multiply them."""


def latency_model(config: StudyConfig) -> LatencyModel | None:
    """The model of `--latency`: a device's name or description (a roofline, at `--latency-batch`
    samples), a measured table, or `module:function`. None where none is named.

    Raises InputError for what is none of them, and for a table measured at another batch size.
    """
    spec = config.latency
    if spec is None:
        return None
    if ":" in spec and not spec.endswith(".json"):
        return from_callable(import_from_here("latency", spec))
    if spec.endswith(".json"):
        data = read_json(Path(spec))
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema == TABLE_SCHEMA:
            table = LatencyTable.load(spec)
            if config.latency_batch not in (None, table.batch):
                raise InputError(
                    f"latency-batch: {spec} was measured at {table.batch} samples, got "
                    f"{config.latency_batch}"
                )
            return table
        if schema != DEVICE_SCHEMA:
            raise InputError(
                f"latency: expected {TABLE_SCHEMA!r} or {DEVICE_SCHEMA!r} in {spec}, got {schema!r}"
            )
    return Roofline(
        DeviceDescription.load(spec),
        config.latency_batch or 1,
        config.group_size,
        config.weight_quantizer in CODEBOOKS,
    )
