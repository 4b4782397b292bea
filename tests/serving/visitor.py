"""Somebody who uses the page in a browser."""

import re

import openai

from cogvx_fast.serving.keys import add_key
from tests.serving.process import WAIT, until

PROMPT = "a red circle moves right on a white background"


class Visitor:
    """Somebody with a key and videos of their own, before the page."""

    def __init__(self, server, browser, name):
        self.address = f"{server.address}/"
        self.key = add_key(server.keys, name)
        self.client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=self.key, max_retries=0)
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        self.errors = []
        self.page = self.new_page()

    def new_page(self, with_key=True):
        page = self.context.new_page()
        page.set_default_timeout(1000 * WAIT)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        if with_key:
            page.add_init_script(f"sessionStorage.setItem('cogvx-fast-key', '{self.key}')")
        return page

    def open(self, page=None):
        """The page, when it has asked the server for everything."""
        page = page or self.page
        page.goto(self.address)
        page.locator("#main").wait_for()
        page.locator("#num_frames option").first.wait_for(state="attached")
        return page

    def ask(self, prompt=PROMPT, **fields):
        page = self.page
        page.fill("#prompt", prompt)
        if fields:
            page.evaluate("document.querySelector('#settings').open = true")
        for name, value in fields.items():
            if page.evaluate(f"document.querySelector('#{name}').tagName") == "SELECT":
                page.select_option(f"#{name}", str(value))
            else:
                page.fill(f"#{name}", str(value))
        page.click("#make")

    def plays(self):
        """Waits until the video moves."""
        page = self.page
        page.locator("#video").wait_for()
        self.see("document.querySelector('#video').readyState >= 2")
        moments = set()
        self.see(lambda: moments.add(page.evaluate("document.querySelector('#video').currentTime")) or len(moments) > 2)

    def see(self, condition):
        """Waits; by questions from outside, as the page's policy lets no text be run in it."""
        if isinstance(condition, str):
            return until(lambda: self.page.wait_for_timeout(10) or self.page.evaluate(condition))
        return until(lambda: self.page.wait_for_timeout(10) or condition())

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def runs(self):
        """Waits until steps are made."""
        self.see(lambda: re.match(r"Step [1-9]", self.text("#state")))

    def shown(self):
        """The id of the video in view."""
        return self.page.evaluate("location.hash.slice(1)")

    def videos(self):
        return [video.id for video in self.client.videos.list()]
