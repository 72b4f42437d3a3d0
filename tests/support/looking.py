"""A headless Chromium loads a file: looking.py PAGE; prints its title, what it logged, every address it asked for.

A program of its own: it runs on the laptop of the test cluster, in an environment with selenium.
"""

from __future__ import annotations

import json
import sys


def main(page: str) -> None:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.get(f"file://{page}")
        heights = browser.execute_script("return [...document.querySelectorAll('svg')].map(s => s.clientHeight)")
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        said = [entry["message"] for entry in browser.get_log("browser")]
        print(json.dumps({"title": browser.title, "said": said, "asked": asked, "heights": heights}))


if __name__ == "__main__":
    main(*sys.argv[1:])
