"""The wire, version 1: names, limits and options that both sides share; `proto/README.md` is the contract."""

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
FEATURES: tuple[str, ...] = ("raw-v1",)

MAX_FRAME = 2**20
"""Bytes of the largest payload frame a receiver takes."""
FRAME = 2**19
"""Bytes of the payload frames we send: 256 KiB to 1 MiB is the fastest range of grpcio."""
MAX_HEADER = 16 * 2**20
"""Bytes of the largest message a client takes: a FetchHeader names every tensor of every round a late client lacks."""
MAX_METRICS = 32
CLIENT_ID = r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?"
"""What a client's id looks like: the rule of `client.id` in a configuration."""

SERVICE = "fedtune.wire.v1.Coordinator"
JOIN = f"/{SERVICE}/Join"
STATUS = f"/{SERVICE}/Status"
FETCH = f"/{SERVICE}/Fetch"
SUBMIT = f"/{SERVICE}/Submit"

_ENVELOPE = 64 * 1024
_SHARED_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_HEADER),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SHARED_OPTIONS,
    ("grpc.max_receive_message_length", MAX_FRAME + _ENVELOPE),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.so_reuseport", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SHARED_OPTIONS,
    ("grpc.max_receive_message_length", MAX_HEADER),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
