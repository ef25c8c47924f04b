"""GET /metrics: what Prometheus reads."""

from typing import Any

from flask import Blueprint, Response

from app.api.health import ANSWER_TIMEOUT_S, problem
from app.api.models import VERSION
from app.api.reference.describe import describes
from app.api.service import service
from app.metrics.exposition import CONTENT_TYPE, Scene, exposition
from app.text.offload import off_hub
from config.settings import Settings

blueprint = Blueprint("metrics", __name__)


@blueprint.get("/metrics")
@describes(tag="health", media_type="text/plain")
def metrics() -> Response:
    """All metrics, of this moment, as Prometheus reads them."""
    response = Response(off_hub(exposition, scene()), content_type=CONTENT_TYPE)
    response.headers["Cache-Control"] = "no-store"
    return response


def scene() -> Scene:
    """Return what is to be told: the pool is asked, and waited for not longer than a scrape may take."""
    owner = service()
    status = owner.pool.query_status(ANSWER_TIMEOUT_S)
    model = owner.models.current()
    return Scene(
        numbers=owner.meter.snapshot(),
        status=status,
        ready=problem(status) is None,
        draining=owner.draining or (status is not None and status.draining),
        model_name=model.card.id if model is not None else owner.settings.served_names[0],
        version=VERSION,
        limits=limits(owner.settings),
    )


def limits(settings: Settings) -> list[tuple[str, str, float]]:
    """Return name, unit and value of every setting that limits something."""
    found = []
    for name, field in Settings.model_fields.items():
        more: dict[str, Any] = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value = getattr(settings, name)
        unit = str(more.get("unit", ""))
        if unit and more.get("group") in ("Limits", "Access", "Server") and isinstance(value, int | float):
            found.append((name, unit, float(value)))
    return found
