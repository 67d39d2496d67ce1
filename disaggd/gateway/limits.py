"""How much one HTTP request may ask of the gateway."""

import msgspec


class GatewayLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that hold before any node sees a request."""

    max_body_bytes: int = 8 << 20
    max_prompts: int = 64
    """Prompts in one completion request; each is a sequence of its own."""
