// The other half of longreel.reports.embed: a column of values, and the records that it packs.
const ABSENT = Symbol("absent");
const cell = (column, i) => {
  if ("same" in column) return column.same;
  if ("each" in column) return column.each[i];
  if ("pick" in column) return column.pick[i] < 0 ? ABSENT : column.of[column.pick[i]];
  const entries = Object.entries(column.object).map(([key, child]) => [key, cell(child, i)]);
  return Object.fromEntries(entries.filter(([, value]) => value !== ABSENT));
};
const inflate = async (text) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
};

const openData = async () => {
  const data = await inflate(document.getElementById("data").textContent);
  const indices = Array.from({ length: data.num_records }, (_, i) => i);
  const records = indices.map((i) => cell(data.records, i));
  const derived = Object.fromEntries(
    Object.entries(data.csv_derived).map(([name, column]) => [name, indices.map((i) => cell(column, i))]),
  );
  const at = (record, path) => path.split(".").reduce((value, key) => value?.[key], record);
  const value = (name, i) => (name in derived ? derived[name][i] : at(records[i], data.csv_fields[name]));
  const csvCell = (value) => {
    if (value === null || value === undefined) return "";
    let text = value === true ? "True" : value === false ? "False" : String(value);
    // As longreel.reports.export.csv_cell: no formula for a spreadsheet.
    if (typeof value === "string" && /^[=+\-@\t\r\n]/.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  const csvText = (rows) => rows.map((row) => row.map(csvCell).join(",") + "\n").join("");
  const names = [...Object.keys(data.csv_fields), ...Object.keys(derived)];
  return {
    ...data,
    records,
    derived,
    value,
    csvText,
    jsonl: () => records.map((record) => JSON.stringify(record) + "\n").join(""),
    csv: () => csvText([names, ...indices.map((i) => names.map((name) => value(name, i)))]),
  };
};

const save = (name, type, content) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
};

// An element with attributes and children; text never becomes markup.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
};

const number = (value) => {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number" || !isFinite(value)) return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 999.5) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-3) return value.toExponential(1);
  return value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
};
const inBytes = (value) => {
  for (const [size, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= size) return `${number(value / size)} ${name}`;
  }
  return `${number(value)} B`;
};
const seconds = (value) => {
  for (const [size, name] of [[1, "s"], [1e-3, "ms"]]) if (value >= size) return `${number(value / size)} ${name}`;
  return value === 0 ? "0 s" : `${number(value * 1e6)} µs`;
};
const tokens = (value) => value.toLocaleString("en-US");
