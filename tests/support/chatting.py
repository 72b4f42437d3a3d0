"""A headless Chromium that chats as a person does: chatting.py URL QUESTION FOLDER; prints what it saw, as JSON.

A program of its own: it runs on a machine of the test cluster, in an environment with selenium.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


def main(url: str, question: str, folder: str) -> None:
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=900,640"):
        options.add_argument(word)
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver")) as browser:
        wait = WebDriverWait(browser, 60)
        browser.get(url)
        wait.until(lambda b: b.find_element(By.ID, "model").text not in ("", "…"))
        found = {"address": browser.current_url, "model": browser.find_element(By.ID, "model").text}
        # no script of the page can read the token
        found["cookie"] = browser.execute_script("return document.cookie")
        text = browser.find_element(By.ID, "text")
        text.send_keys(question, Keys.ENTER)
        wait.until(lambda b: b.find_elements(By.CLASS_NAME, "note"))
        answer = browser.find_element(By.CSS_SELECTOR, ".assistant")
        found["said"] = answer.find_element(By.CLASS_NAME, "said").text
        found["note"] = answer.find_element(By.CLASS_NAME, "note").text
        fold = answer.find_element(By.TAG_NAME, "details")
        found["folded"] = not fold.get_attribute("open")
        found["thought"] = fold.find_element(By.TAG_NAME, "div").get_attribute("textContent")
        _picture(browser, folder, "light")
        _slow(browser, 60_000)  # the answer of a small model would be there before a hand reaches the key
        text.send_keys("Tell me more, for a long time.", Keys.ENTER)
        wait.until(lambda b: b.find_element(By.ID, "stop").is_displayed())
        browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
        wait.until(lambda b: b.find_element(By.ID, "send").is_displayed())
        _slow(browser, 0)
        found["notes"] = [note.text for note in browser.find_elements(By.CLASS_NAME, "note")]
        browser.find_element(By.ID, "new").click()
        found["turns"] = len(browser.find_elements(By.CLASS_NAME, "turn"))
        browser.find_element(By.ID, "text").send_keys(question, Keys.ENTER)
        wait.until(lambda b: b.find_elements(By.CLASS_NAME, "note"))
        _picture(browser, folder, "dark")
        found["fresh"] = _fresh(browser)
        found["errors"] = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    print(json.dumps(found))


HALF = """
const sent = window.sent = [], part = 'data: {"choices":[{"delta":{"content":"half"}}]}\\n\\n';
window.fetch = async (_, options) => {
  sent.push(JSON.parse(options.body).messages);
  return new Response(new ReadableStream({start(to) {
    to.enqueue(new TextEncoder().encode(part));
    options.signal.addEventListener("abort", () => to.error(new DOMException("", "AbortError")));
  }}));
};
"""
"""A STUB of a service that never comes to the end of an answer."""


def _fresh(browser: webdriver.Chrome) -> list[str]:
    """What is sent of a chat that was begun anew in the middle of an answer."""
    wait, text = WebDriverWait(browser, 60), browser.find_element(By.ID, "text")
    browser.execute_script(HALF)
    for question in ("old", "new"):
        browser.find_element(By.ID, "new").click()
        wait.until(lambda b: b.find_element(By.ID, "send").is_displayed())
        text.send_keys(question, Keys.ENTER)
        wait.until(lambda b: [said for said in b.find_elements(By.CLASS_NAME, "said") if said.text == "half"])
    return [message["content"] for message in browser.execute_script("return sent[1]")]


def _slow(browser: webdriver.Chrome, latency_ms: int) -> None:
    browser.execute_cdp_cmd("Network.enable", {})
    conditions = {"offline": False, "latency": latency_ms, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def _picture(browser: webdriver.Chrome, folder: str, scheme: str) -> None:
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    time.sleep(0.3)
    Path(folder, f"chat-{scheme}.png").write_bytes(browser.get_screenshot_as_png())


if __name__ == "__main__":
    main(*sys.argv[1:])
