"""Whether the Hugging Face hub can be reached: asked once and briefly, where its client retries for half a minute."""

from threading import Thread

from modegpt_graph.errors import InputError

PATIENCE_SECONDS = 3.0


class HubUnreachable(InputError):
    """The hub did not answer, and what was asked of it is not in the local cache."""


def hub_is_reachable(timeout: float = PATIENCE_SECONDS) -> bool:
    """True where the hub's endpoint answers anything at all within `timeout` seconds.

    The request goes through the hub client's own session, so that its proxies, certificates, endpoint (`HF_ENDPOINT`)
    and offline switch (`HF_HUB_OFFLINE`) count here too.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answered: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=timeout)
            answered.append(True)
        except Exception:  # any failure to get an answer, whatever the transport calls it, means the same here
            return

    # A name server that never answers blocks below the reach of the request's own timeout: hence the thread.
    asking = Thread(target=ask, name="hub-reachable", daemon=True)
    asking.start()
    asking.join(timeout)
    return bool(answered)
