/** Gives a section its Table and CSV buttons, so that whatever is drawn can also be read and taken away. */

import { byId, element, table } from "./dom.js";
import { clock, exact } from "./format.js";

/**
 * `data()` returns `{columns, rows}` with plain values. `toggled` is the element that the table takes the place of;
 * without it there is only the CSV button, for sections that are tables already.
 */
export function addTools(section, { title, data, toggled }) {
  const tools = byId(section).querySelector(".tools");
  const about = () => element("span", { className: "unseen" }, ` of ${title}`);
  if (toggled) {
    const button = element("button", { type: "button", className: "quiet", "aria-pressed": "false" }, "Table", about());
    const holder = element("div", { className: "scroll as-table", tabIndex: 0, role: "region", "aria-label": `Table of ${title}`, hidden: true });
    toggled.after(holder);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      holder.replaceChildren(...(shown ? [asTable(title, data())] : []));
      holder.hidden = !shown;
      toggled.hidden = shown;
    });
    tools.append(button);
  }
  const button = element("button", { type: "button", className: "quiet" }, "CSV", about());
  button.addEventListener("click", () => download(`confrere-${section}.csv`, data()));
  tools.append(button);
}

function asTable(title, { columns, rows }) {
  const numeric = (index) => rows.length > 0 && rows.every((row) => row[index] === null || typeof row[index] === "number");
  const headings = columns.map((column, index) => ({ title: column, numeric: numeric(index) }));
  const text = (value) => (value === null ? "–" : typeof value === "number" ? exact(value) : String(value));
  return table(`${title}, at ${clock(Date.now())}`, headings, rows.map((row) => row.map(text)));
}

/** A field of a CSV file. Names come from peers: none may begin what a spreadsheet would compute. */
function field(value) {
  const text = value === null ? "" : String(value);
  const safe = typeof value === "string" && /^[=+\-@\t]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function download(file, { columns, rows }) {
  const csv = [columns, ...rows].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
  const url = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
  element("a", { href: url, download: file }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
