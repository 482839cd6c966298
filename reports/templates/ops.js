"use strict";
(() => {
  const number = (text) => parseFloat(text.replace(/,/g, ""));

  for (const panel of document.querySelectorAll("[data-table]")) {
    const body = panel.querySelector("tbody");
    const heads = [...panel.querySelectorAll("th")];
    const rows = [...body.rows];
    const input = panel.querySelector("input");
    const output = panel.querySelector("output");

    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        const sign = direction === "ascending" ? 1 : -1;
        const numeric = head.dataset.type === "number";
        const keyed = rows.map((row) => {
          const text = row.cells[column].textContent.trim();
          return [numeric ? number(text) : text, row];
        });
        // Cells without a figure stay at the end in either direction.
        keyed.sort(([a], [b]) => {
          if (!numeric) return sign * a.localeCompare(b);
          if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
          return sign * (a - b);
        });
        for (const other of heads) other.setAttribute("aria-sort", other === head ? direction : "none");
        body.append(...keyed.map(([, row]) => row));
      });
    });

    const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !words.every((word) => texts[i].includes(word));
        shown += !row.hidden;
      });
      output.value = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
    };
    input.addEventListener("input", filter);
    panel.querySelector(".tools").hidden = false;
    const measure = () => panel.style.setProperty("--first", `${heads[0].getBoundingClientRect().width}px`);
    measure();
    addEventListener("resize", measure);
  }

  // The other half of longreel.reports.embed.
  const ABSENT = Symbol("absent");
  const cell = (column, i) => {
    if ("same" in column) return column.same;
    if ("each" in column) return column.each[i];
    if ("pick" in column) return column.pick[i] < 0 ? ABSENT : column.of[column.pick[i]];
    const entries = Object.entries(column.object).map(([key, child]) => [key, cell(child, i)]);
    return Object.fromEntries(entries.filter(([, value]) => value !== ABSENT));
  };
  const load = () => {
    const data = JSON.parse(document.getElementById("records").textContent);
    return [data, Array.from({ length: data.num_records }, (_, i) => cell(data.records, i))];
  };
  const jsonl = () => load()[1].map((record) => JSON.stringify(record) + "\n").join("");
  const csv = () => {
    const [data, records] = load();
    const quote = (value) => {
      if (value === null || value === undefined) return "";
      let text = value === true ? "True" : value === false ? "False" : String(value);
      // As longreel.reports.export.csv_cell: no formula for a spreadsheet.
      if (typeof value === "string" && /^[=+\-@\t\r\n]/.test(text)) text = `'${text}`;
      return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
    };
    const lines = [[...Object.keys(data.csv_fields), ...Object.keys(data.csv_derived)]];
    records.forEach((record, i) => {
      const fields = Object.values(data.csv_fields).map((path) => path.split(".").reduce((at, key) => at?.[key], record));
      lines.push([...fields, ...Object.values(data.csv_derived).map((values) => values[i])]);
    });
    return lines.map((line) => line.map(quote).join(",") + "\n").join("");
  };
  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };
  document.getElementById("save-jsonl").addEventListener("click", () => save("records.jsonl", "application/jsonl", jsonl()));
  document.getElementById("save-csv").addEventListener("click", () => save("records.csv", "text/csv", csv()));
  document.querySelector(".downloads").hidden = false;
})();
