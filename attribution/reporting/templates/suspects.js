"use strict";
// The choices that a person makes on suspects.html, and the files they become.
const cards = [...document.querySelectorAll(".suspect")];
const grid = document.getElementById("suspects");
const value = (id) => document.getElementById(id).value;

function choice(card) {
  return card.querySelector("input:checked").value;
}

function show() {
  for (const card of cards) {
    const reasons = card.dataset.reasons.split("|");
    const fits = [
      ["class", card.dataset.label],
      ["choice", choice(card)],
    ].every(([id, own]) => value(id) === "" || value(id) === own);
    card.hidden = !(fits && (value("reason") === "" || reasons.includes(value("reason"))));
  }
  const order = {
    doubt: (a, b) => a.dataset.rank - b.dataset.rank,
    class: (a, b) => a.dataset.label.localeCompare(b.dataset.label),
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name),
  }[value("sort")];
  grid.append(...cards.sort((a, b) => order(a, b) || a.dataset.rank - b.dataset.rank));
  count();
}

function count() {
  const made = cards.map(choice);
  const number = (kind) => made.filter((each) => each === kind).length;
  document.getElementById("count").textContent =
    `${cards.filter((card) => !card.hidden).length} of ${cards.length} shown. ` +
    `To remove: ${number("remove")}. To relabel: ${number("relabel")}. To keep: ${number("keep")}.`;
}

function cell(text) {
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function download(name, header, rows) {
  const text = [header, ...rows].map((row) => row.map(cell).join(",") + "\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
}

document.getElementById("keep").addEventListener("click", () => {
  const removed = new Set(cards.filter((c) => choice(c) === "remove").map((c) => c.dataset.id));
  const all = document.getElementById("examined").textContent.trim().split("\n");
  const rows = all.map((line) => line.split(",")).filter(([id]) => !removed.has(id));
  download("keep.csv", ["example_id", "split"], rows);
});

document.getElementById("labels").addEventListener("click", () => {
  const relabelled = cards.filter((card) => choice(card) === "relabel");
  download(
    "labels.csv",
    ["example_id", "label", "file_name"],
    relabelled.map((c) => [c.dataset.id, c.querySelector("select").value, c.dataset.name]),
  );
});

for (const id of ["class", "reason", "choice", "sort"]) {
  document.getElementById(id).addEventListener("change", show);
}
for (const card of cards) {
  card.addEventListener("change", (event) => {
    if (event.target.tagName === "SELECT") {
      card.querySelector("input[value=relabel]").checked = true;
    }
    count();
  });
  card.querySelector(".zoom").addEventListener("click", () => {
    const large = document.getElementById("large");
    large.querySelector("img").src = card.querySelector("img").src;
    large.querySelector("p").textContent = card.dataset.name;
    large.showModal();
  });
  card.querySelector(".copy").addEventListener("click", () => {
    getSelection().selectAllChildren(card.querySelector("code"));
    document.execCommand("copy");
  });
}
document.getElementById("large").addEventListener("click", (event) => event.currentTarget.close());
show();
