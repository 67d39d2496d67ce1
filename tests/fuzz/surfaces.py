"""All that is fuzzed. Their shares of a long run add up to 1."""

from tests.fuzz.decoders import DECODERS, HANDSHAKE
from tests.fuzz.gateway_in_process import GATEWAY
from tests.fuzz.gateway_on_the_wire import SOCKETS
from tests.fuzz.node_links import DECODE, PREFILL
from tests.fuzz.notifications import NOTIFICATIONS
from tests.fuzz.router_links import ROUTER
from tests.fuzz.sampling import SAMPLING
from tests.fuzz.surface import Surface

SURFACES: tuple[Surface, ...] = (GATEWAY, SOCKETS, HANDSHAKE, DECODERS, DECODE, PREFILL, ROUTER, NOTIFICATIONS, SAMPLING)
