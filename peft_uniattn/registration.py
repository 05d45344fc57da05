"""Adds our methods to PEFT's method types: PEFT's own registration function takes no name it does not know."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def peft_type(name: str) -> PeftType:
    """
    The member `name` of [`peft.PeftType`], created if PEFT does not have it.

    A real member rather than a plain string, because PEFT's status calls and transformers' adapter calls read
    `.value` and compare with `PeftType`. Enumerations are closed by design, so the member is put where the `enum`
    module itself puts members. Tested so that a change in Python or PEFT fails loudly.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumType refuses to set members, its parent class does not.
    type.__setattr__(PeftType, name, member)
    return member


UNIATTN = peft_type("UNIATTN")
CLA = peft_type("CLA")
LLMDROP = peft_type("LLMDROP")


def register(member: PeftType, config_cls: type, model_cls: Any) -> None:
    """Tell PEFT about a method, unless it knows it."""
    if member not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=member.value.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
