"use strict";
const items = [...document.querySelectorAll(".item")];
const tools = document.querySelector(".tools");
const list = document.querySelector("#items");
const [classes, order] = tools.querySelectorAll("select");

const names = new Map();
for (const item of items)
  for (const chip of item.querySelectorAll(".chip")) names.set(chip.dataset.class, chip.textContent.trim());
for (const [value, text] of [...names].sort((a, b) => a[1].localeCompare(b[1])))
  classes.append(new Option(text, value));
if (!items.some((item) => item.dataset.iou)) order.parentElement.hidden = true;
tools.hidden = items.length < 2;

function arrange() {
  const sign = { worst: 1, best: -1 }[order.value];
  const known = (item) => (item.dataset.iou ? sign * Number(item.dataset.iou) : Infinity);
  const sorted = sign ? [...items].sort((a, b) => known(a) - known(b)) : items;
  list.append(...sorted);
  for (const item of items)
    item.hidden = classes.value !== "" && !item.querySelector(`.chip[data-class="${classes.value}"]`);
}
tools.addEventListener("change", arrange);

const zoom = document.querySelector("dialog");
list.addEventListener("click", (event) => {
  if (event.target.tagName !== "IMG") return;
  const picture = event.target.cloneNode();
  zoom.style.setProperty("--aspect", event.target.naturalWidth / event.target.naturalHeight);
  zoom.replaceChildren(picture);
  zoom.showModal();
});
zoom.addEventListener("click", () => zoom.close());
