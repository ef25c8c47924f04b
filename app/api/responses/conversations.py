"""What a response continues: stored responses and items, as one conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from app.api.keeping import most_of_conversation, store, store_errors
from app.api.responses.items import InputItem, ItemReference, MessageItem
from app.api.responses.schemas import ResponseRequest
from app.api.responses.translation import STORED, Said
from app.api.service import tenant_salt
from app.errors import ApiError, invalid
from app.ids import new_id
from app.store.record import Record
from app.text.offload import off_hub_if_large

KIND = "response"
_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])
# An item in the measure of `off_hub_if_large`.
_ITEM_COST = 128
_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def read_conversation(body: ResponseRequest) -> tuple[list[Said], list[dict[str, Any]]]:
    """Return all that the model is to read, and the items of this request alone, as they are kept.

    Raises `ApiError` for a response or an item that is not stored.
    """
    said: list[Said] = []
    if body.previous_response_id is not None:
        earlier = history(body.previous_response_id)
        # Each costs some microseconds, and there may be thousands.
        items = off_hub_if_large(_ITEM_COST * len(earlier), _ITEMS.validate_python, earlier)
        said += [Said(item, STORED) for item in items]
    own = []
    referred = _referred(body)
    for place, item in enumerate(body.input):
        origin = f"input[{place}]"
        if isinstance(item, ItemReference):
            found = referred[item.id]
            own.append(found)
            said += [Said(each, origin) for each in _ITEMS.validate_python([found])]
        else:
            own.append(kept_item(item))
            said.append(Said(item, origin))
    return said, own


def history(response_id: str) -> list[dict[str, Any]]:
    """Return the items of a stored response and all that it continues, in order. Raises `ApiError`."""
    with store_errors():
        records = store().chain(KIND, tenant_salt(), response_id, most_of_conversation())
    if records is None:
        raise ApiError(
            404,
            f"Previous response with id {response_id[:64]!r} not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    last = records[-1]
    if last.is_running:
        raise invalid("This response is not complete yet.", "previous_response_id")
    return conversation_of(records)


def conversation_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The items of several responses that continue each other. A call that was cut off is none."""
    items: list[dict[str, Any]] = []
    for record in records:
        items += map(dict, record.input)
        items += [
            item for item in record.body["output"] if item["type"] != "function_call" or item["status"] == "completed"
        ]
    return items


def kept_item(item: InputItem) -> dict[str, Any]:
    """An item of the input as it is kept and listed: with an id, a type and a list of parts."""
    given: dict[str, Any] = item.model_dump(exclude_unset=True)
    kind = str(item.type)
    given["type"] = kind
    given["id"] = item.id or new_id(_PREFIXES[kind])
    given.setdefault("status", "completed")
    if isinstance(item, MessageItem):
        of_model = item.role == "assistant"
        given["content"] = [_kept_part(part, of_model) for part in given["content"]]
    return given


def _kept_part(part: Mapping[str, Any], of_model: bool) -> dict[str, Any]:
    if part["type"] == "refusal":
        return dict(part)
    if of_model:
        return {"annotations": [], **part, "type": "output_text"}
    return {**part, "type": "input_text"}


def _referred(body: ResponseRequest) -> Mapping[str, dict[str, Any]]:
    """Return the items that the request refers to, by id; each once, or a few bytes could stand for any number.

    Raises `ApiError`.
    """
    places: dict[str, str] = {}
    for place, item in enumerate(body.input):
        if isinstance(item, ItemReference):
            param = f"input[{place}].id"
            if item.id in places:
                raise invalid(f"Item with id {item.id[:64]!r} is there twice.", param)
            places[item.id] = param
    if not places:
        return {}
    with store_errors("input"):
        found = store().items(tenant_salt(), list(places), most_of_conversation())
    for item_id, param in places.items():
        if item_id not in found:
            raise ApiError(404, f"Item with id {item_id[:64]!r} not found.", param=param)
    return found
