// One table per group: rows from the data, a page of them at a time, sorted and filtered.
const PAGE = 100;
const MOST_PRINTED = 3000;

const details = (data, ratios, i) => {
  const r = data.records[i];
  const list = make("dl", { class: "details" });
  const say = (name, ...value) => list.append(make("div", {}, make("dt", {}, name), make("dd", {}, ...value)));
  const each = (map, words) => Object.entries(map).map(([name, value]) => `${name} ${words(value)}`).join(", ");
  const command = data.derived.reproduce[i];
  if (r.reason) say("Reason", r.reason);
  if (command) {
    const copy = make("button", { type: "button", onclick: () => navigator.clipboard?.writeText(command) }, "Copy");
    say(r.provenance.reproduce ? "Command" : "Command of its sweep", make("code", {}, command), " ", copy);
  } else say("Command", "the record does not say");
  const ratio = ratios.ratio(i), bounds = ratios.interval(i), verdict = ratios.verdict(i);
  const to = ratios.name() === null ? "the baseline" : ratios.name();
  if (ratio !== null) {
    const within = bounds ? ` (${number(bounds[0])}–${number(bounds[1])})` : "";
    say("Verdict", `${ratio.toFixed(2)} × ${to}${within}: ${verdict ?? "no verdict"}`);
  }
  if (Object.keys(r.error).length) say("Error", each(r.error, number));
  if (r.step_s && r.status === "ok") {
    const range = r.interval_s ? ` (${seconds(r.interval_s[0])} to ${seconds(r.interval_s[1])})` : "";
    say("Step", `${seconds(r.step_s)}${range}, ${number(data.derived.samples_per_s[i])} samples/s`);
  }
  if (r.samples_s.length) say(`${r.samples_s.length} samples`, r.samples_s.map(seconds).join(", "));
  if (Object.keys(r.breakdown).length) say("Parts", each(r.breakdown, seconds));
  if (Object.keys(r.hidden).length) say("Hidden communication", each(r.hidden, seconds));
  if (Object.keys(r.memory).length) {
    const of = r.memory_usable ?? r.memory_limit;
    say("Memory", each(r.memory, inBytes) + (of ? `; ${inBytes(of)} to use` : ""));
  }
  if (Object.keys(r.traffic).length) say("Traffic of one rank", each(r.traffic, inBytes));
  if (r.mfu !== null) say("MFU, HFU", `${(100 * r.mfu).toFixed(1)} %, ${(100 * (r.hfu ?? r.mfu)).toFixed(1)} %`);
  if (r.energy_j !== null) say("Energy", `${number(r.energy_j)} J per step, all devices`);
  if (Object.keys(r.telemetry).length) say("Devices", each(r.telemetry, (value) => JSON.stringify(value)));
  say("Commit, time, key", [r.provenance.commit, r.provenance.time, r.key].filter(Boolean).join(", "));
  const whole = make("pre", {}, JSON.stringify(r, null, 1));
  list.append(make("details", {}, make("summary", {}, "Whole record"), whole));
  return list;
};

const buildTable = (data, ratios, group) => {
  const panel = document.getElementById(`${group.id}-rows`);
  const { columns } = group;
  const ratioColumn = columns.findIndex((c) => c.value === "ratio_to_baseline");
  const verdictColumn = columns.findIndex((c) => c.name === "Verdict");
  const text = (row, column) => {
    const i = group.records[row];
    if (column === ratioColumn && !ratios.isDefault()) return ratios.ratio(i)?.toFixed(2) ?? "–";
    if (column === verdictColumn && !ratios.isDefault()) return ratios.verdict(i) ?? "–";
    return cell(group.texts[column], row);
  };
  const key = (row, column) => {
    const i = group.records[row];
    if (column === columns.length) return data.records[i].status;
    if (column === ratioColumn) return ratios.ratio(i);
    const { value, numeric } = columns[column];
    if (value) return data.value(value, i);
    const words = text(row, column);
    return numeric ? (words === "–" ? null : parseFloat(words.replace(/,/g, ""))) : words;
  };
  const searched = group.records.map((i, row) => {
    const r = data.records[i];
    const words = columns.map((_, column) => `${cell(group.texts[column], row)} ${cell(group.notes[column], row)}`);
    return [...words, r.status, r.reason ?? "", group.is_baseline[row] ? "baseline" : ""].join(" ").toLowerCase();
  });

  let rows = group.records.map((_, row) => row);
  let sorted = { column: -1, sign: 1 };
  let first = 0, size = PAGE;
  const open = new Set();

  const heads = [...columns, { name: "Status", unit: "", numeric: false, about: "What became of the point, and why" }].map(
    (column, c) => {
      const words = [column.name, column.unit ? make("small", {}, column.unit) : ""];
      const button = make("button", { type: "button", title: column.about, onclick: () => sort(c) }, ...words);
      return make("th", { scope: "col", "aria-sort": "none", "data-type": column.numeric ? "number" : null }, button);
    },
  );
  const body = make("tbody");
  const table = make(
    "table",
    { class: "t", "aria-labelledby": `${group.id}-table`, "aria-describedby": `${group.id}-caption` },
    make("thead", {}, make("tr", {}, ...heads)),
    body,
  );
  const frame = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": `${group.id}-table` }, table);
  const about = make("output", {});
  const step = (by) => () => { first = Math.max(0, first + by * size); draw(); };
  const back = make("button", { type: "button", onclick: step(-1) }, "Previous");
  const on = make("button", { type: "button", onclick: step(1) }, "Next");
  const all = make("button", { type: "button", onclick: () => { size = size === PAGE ? Infinity : PAGE; first = 0; draw(); } });
  panel.replaceChildren(make("div", { class: "pager" }, about, back, on, all), frame);

  const line = (row, place) => {
    const i = group.records[row], r = data.records[i], failed = r.status !== "ok";
    const cells = columns.map((column, c) => {
      const note = c === ratioColumn || c === verdictColumn ? "" : cell(group.notes[c], row);
      const mark = c === 1 && group.is_baseline[row] ? make("span", { class: "mark" }, "baseline") : "";
      return make("td", { class: column.numeric ? "n" : null }, text(row, c), mark, note ? make("small", {}, note) : "");
    });
    const name = `Details of ${data.configurations[data.configuration[i]]} at ${tokens(r.seq_len)} tokens`;
    const more = make(
      "button",
      { type: "button", class: "more", "aria-label": name, "aria-expanded": String(open.has(row)), onclick: () => toggle(row, more) },
      "Details",
    );
    const status = failed ? [make("b", {}, r.status), ` ${r.reason} `] : ["ok "];
    cells.push(make("td", {}, ...status, more));
    const mark = group.is_baseline[row] && !failed ? "b" : failed ? "f" : null;
    return make("tr", { class: mark, "aria-rowindex": String(place + 2) }, ...cells);
  };
  const opened = (row) =>
    make("tr", { class: "opened" }, make("td", { colspan: String(columns.length + 1) }, details(data, ratios, group.records[row])));
  const toggle = (row, button) => {
    const line = button.closest("tr");
    if (open.delete(row)) line.nextElementSibling.remove();
    else {
      open.add(row);
      line.after(opened(row));
    }
    button.setAttribute("aria-expanded", String(open.has(row)));
  };
  const draw = () => {
    if (first >= rows.length) first = 0;
    const shown = rows.slice(first, first + size);
    body.replaceChildren(...shown.flatMap((row, k) => (open.has(row) ? [line(row, first + k), opened(row)] : [line(row, first + k)])));
    table.setAttribute("aria-rowcount", String(rows.length + 1));
    const total = group.records.length;
    const part = rows.length > shown.length ? `Rows ${first + 1}–${first + shown.length} of ` : "";
    about.value = `${part}${rows.length === total ? `${total} rows` : `${rows.length} of ${total} rows`}`;
    const paged = rows.length > PAGE;
    for (const button of [back, on, all]) button.hidden = !paged;
    back.disabled = first === 0;
    on.disabled = first + size >= rows.length;
    all.textContent = size === PAGE ? `Show all ${rows.length}` : `Show ${PAGE} at a time`;
    frame.classList.toggle("tall", shown.length > 30);
    panel.style.setProperty("--first", `${heads[0].getBoundingClientRect().width}px`);
  };
  const order = () => {
    if (sorted.column < 0) return;
    const keys = new Map(rows.map((row) => [row, key(row, sorted.column)]));
    const none = (value) => value === null || value === undefined || Number.isNaN(value);
    rows.sort((p, q) => {
      const [a, b] = [keys.get(p), keys.get(q)];
      // Rows without a figure stay at the end in either direction.
      if (none(a) || none(b)) return none(a) - none(b);
      return sorted.sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    });
  };
  const sort = (column) => {
    sorted = { column, sign: sorted.column === column ? -sorted.sign : 1 };
    heads.forEach((head, c) =>
      head.setAttribute("aria-sort", c !== column ? "none" : sorted.sign > 0 ? "ascending" : "descending"),
    );
    first = 0;
    order();
    draw();
  };
  draw();
  addEventListener("resize", () => panel.style.setProperty("--first", `${heads[0].getBoundingClientRect().width}px`));
  return {
    filter: (wanted, words) => {
      rows = group.records.map((_, row) => row).filter((row) => {
        const r = data.records[group.records[row]];
        return wanted.every(([field, value]) => String(r[field]) === value) && words.every((w) => searched[row].includes(w));
      });
      first = 0;
      order();
      draw();
      document.getElementById(`${group.id}-section`).hidden = rows.length === 0;
      return rows.length;
    },
    redraw: () => {
      order();
      draw();
    },
    print: (whole) => {
      const before = size;
      if (whole) size = Infinity;
      first = whole ? 0 : first;
      draw();
      size = before;
    },
    count: () => rows.length,
  };
};

const startTables = (data, ratios) => {
  const tables = data.groups.map((group) => buildTable(data, ratios, group));
  const form = document.getElementById("filters");
  const output = form.querySelector("output");
  const filter = () => {
    const wanted = [...form.querySelectorAll("select")].filter((s) => s.value).map((s) => [s.name, s.value]);
    const words = form.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = tables.map((table) => table.filter(wanted, words)).reduce((a, b) => a + b, 0);
    output.value = found === data.num_records ? `${found} rows` : `${found} of ${data.num_records} rows`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  output.value = `${data.num_records} rows`;
  addEventListener("beforeprint", () => {
    const few = tables.reduce((sum, table) => sum + table.count(), 0) <= MOST_PRINTED;
    if (few) tables.forEach((table) => table.print(true));
  });
  addEventListener("afterprint", () => tables.forEach((table) => table.print(false)));
  return tables;
};
