"use strict";
(async () => {
{% include "data.js" %}
{% include "ratios.js" %}
{% include "table.js" %}
{% include "figures.js" %}

if (!("DecompressionStream" in window)) {
  for (const note of document.querySelectorAll(".waits")) note.textContent = "This browser cannot unpack the records of this page; records.csv beside it has them.";
  return;
}
const data = await openData();
const ratios = ratiosOf(data);
const tables = startTables(data, ratios);
startFigures(data, ratios);

const choice = document.getElementById("denominator");
choice.addEventListener("change", () => {
  ratios.choose(Number(choice.value));
  drawHeat(data, ratios);
  tables.forEach((table) => table.redraw());
  for (const note of document.querySelectorAll(".ratio-note")) {
    note.textContent = ratios.isDefault() ? "" : `Ratios and verdicts are to ${ratios.name()}, not to the baseline.`;
  }
});
choice.closest(".switch").hidden = false;
document.getElementById("save-jsonl").addEventListener("click", () => save("records.jsonl", "application/jsonl", data.jsonl()));
document.getElementById("save-csv").addEventListener("click", () => save("records.csv", "text/csv", data.csv()));
document.querySelector(".downloads").hidden = false;
document.documentElement.dataset.ready = "";
})();
