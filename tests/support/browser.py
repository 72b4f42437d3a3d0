"""A headless Chromium that does what a person does in JupyterLab: browser.py URL PICTURE; prints what a cell printed.

browser.py URL PICTURE HEADING: only waits for a notebook with that heading, and prints its first lines.
browser.py URL PICTURE "" SIGN: makes the file SIGN when the page is there, and loads it again once that is gone.

A program of its own: it runs on the laptop of the test cluster, in an environment with selenium.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions as seen
from selenium.webdriver.support.ui import WebDriverWait

STATUS_BAR = (By.ID, "jp-main-statusbar")  # the notebook's own sign says idle before there is a kernel
CELL = "print('six times seven is', 6 * 7)"


def clicked(place: tuple[str, str]) -> Callable[[webdriver.Chrome], bool]:
    """True once a click has reached it: the page may be drawn anew at that moment, or something lie before it."""

    def look(browser: webdriver.Chrome) -> bool:
        try:
            browser.find_element(*place).click()
        except WebDriverException:
            return False
        return True

    return look


def main(url: str, picture: str, heading: str = "", sign: str = "") -> None:
    options = webdriver.ChromeOptions()
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,800",
    ):
        options.add_argument(word)
    options.binary_location = "/usr/bin/chromium"
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    with webdriver.Chrome(options=options, service=service) as browser:
        wait = WebDriverWait(browser, 60)
        browser.get(url)
        if heading:
            title = (By.XPATH, f"//div[contains(@class, 'jp-RenderedMarkdown')]//h1[contains(., '{heading}')]")
            print(wait.until(seen.visibility_of_element_located(title)).text)
            time.sleep(2)
            Path(picture).write_bytes(browser.get_screenshot_as_png())
            return
        card = (By.CSS_SELECTOR, ".jp-LauncherCard[data-category='Notebook']")
        wait.until(seen.element_to_be_clickable(card))
        if sign:
            Path(sign).touch()
            while Path(sign).exists():
                time.sleep(0.1)
            browser.refresh()
        wait.until(clicked(card))
        wait.until(seen.text_to_be_present_in_element(STATUS_BAR, "| Idle"))  # the kernel is there and connected
        wait.until(clicked((By.CSS_SELECTOR, ".jp-Notebook .cm-content")))
        ActionChains(browser).send_keys(CELL).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
        output = (By.CSS_SELECTOR, ".jp-OutputArea-output pre")
        print(wait.until(seen.visibility_of_element_located(output)).text)
        time.sleep(1)
        Path(picture).write_bytes(browser.get_screenshot_as_png())


if __name__ == "__main__":
    main(*sys.argv[1:])
