"""What is asked of the Hugging Face Hub's API, by our own session: bounded, and with the token kept to its host.

The requests are those of huggingface_hub (``list_models``, ``model_info``, ``get_paths_info``), whose client follows
any Link header with the token, reads answers of any size, and ends a listing at the first entry that it cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import requests

from audit.errors import FetchError
from audit.states import ItemState
from crawlers.crawl import News
from crawlers.http import Session, check_status
from crawlers.items import dict_of, list_of, text_of

PAGE = 100
EXPAND = ("author", "cardData", "lastModified", "sha", "siblings", "tags")
BAD_TOKEN = "Invalid credentials in Authorization header"
DISABLED = "Access to this resource is disabled."


class HubApi:
    """Models of the hub at ``endpoint``, as the JSON objects that it answers."""

    def __init__(self, endpoint: str, session: Session) -> None:
        self.endpoint, self.session = endpoint, session

    def listing(self, asked: Mapping[str, Any]) -> Iterator[tuple[list[dict[str, Any]], tuple[str, ...]]]:
        """Pages of models, and what is to be recorded of a listing that is left because it has no end.

        Raises FetchError.
        """
        url, parameters = f"{self.endpoint}/api/models", {**asked, "limit": PAGE, "expand": EXPAND}
        news = News(self.endpoint)
        following: str | None = url
        while following is not None:
            here = following
            answer, following = self._ask(here, self.endpoint, parameters if here == url else None)
            models = [dict_of(model) for model in list_of(answer, 10 * PAGE)]
            ids = {text_of(model.get("id")) for model in models}
            endless = news.note(ids) if following else ()
            if following == here:
                endless = (f"the listing of {self.endpoint} names a page as its own successor: it was left there",)
            yield models, endless
            if endless:
                return

    def model(self, model_id: str, revision: str | None = None) -> dict[str, Any]:
        """One model, at its newest commit or at ``revision``. Raises FetchError."""
        url = f"{self.endpoint}/api/models/{quote(model_id)}"
        url += f"/revision/{quote(revision, safe='')}" if revision else ""
        return dict_of(self._ask(url, model_id, {"expand": EXPAND})[0])

    def file(self, model_id: str, path: str, revision: str) -> dict[str, Any] | None:
        """Size, hash and security status of one file; None where it is not there. Raises FetchError."""
        url = f"{self.endpoint}/api/models/{quote(model_id)}/paths-info/{quote(revision, safe='')}"
        answer, _ = self._ask(url, model_id, form={"paths": [path], "expand": "true"})
        return next((one for one in map(dict_of, list_of(answer)) if one.get("path") == path), None)

    def _ask(
        self, url: str, what: str, parameters: Mapping[str, Any] | None = None, form: Mapping[str, Any] | None = None
    ) -> tuple[Any, str | None]:
        try:
            return self.session.get_page(url, parameters, form=form, check=_checking(what))
        except FetchError as error:
            if error.status is None and error.state == ItemState.failed:
                raise FetchError(f"{what} cannot be had from the hub: {error}", ItemState.failed, error.wait) from None
            raise


def _checking(what: str) -> Callable[[requests.Response], None]:
    """A check of an answer's status that knows the hub's error codes."""

    def check(response: requests.Response) -> None:
        code, message = (response.headers.get(f"X-Error-{name}", "") for name in ("Code", "Message"))
        if response.status_code < 400:
            return
        if code == "GatedRepo":
            raise gated(what)
        if message == DISABLED:
            raise FetchError(f"{what} is disabled by the hub", ItemState.gone)
        of_a_model = response.status_code == 401 and message != BAD_TOKEN and "/api/models/" in response.url
        if code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound") or of_a_model:
            raise FetchError(f"{what} is not there, or private", ItemState.gone)
        check_status(response)

    return check


def gated(what: str) -> FetchError:
    """The failure of what needs an account's permission."""
    return FetchError(
        f"{what} is gated or private: ask for access on its page, and give that account's token (HF_TOKEN)",
        ItemState.failed,
    )
