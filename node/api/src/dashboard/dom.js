/** Finds and makes elements; whatever comes from the API goes in as text, never as markup. */

export const byId = (id) => document.getElementById(id);

/** An element with properties (or attributes, where it has no such property) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A table. Columns are `{title, numeric}`, cells texts or elements; the first cell of a row is its heading. */
export function table(caption, columns, rows) {
  const kind = (index) => (columns[index].numeric ? "numeric" : "");
  const headings = element("tr", {}, ...columns.map((column, index) => element("th", { scope: "col", className: kind(index) }, column.title)));
  const first = (cell) => element("th", { scope: "row", className: kind(0) }, cell);
  const other = (cell, index) => element("td", { className: kind(index + 1) }, cell);
  const row = ([heading, ...cells]) => element("tr", {}, first(heading), ...cells.map(other));
  return element("table", {}, element("caption", {}, caption), element("thead", {}, headings), element("tbody", {}, ...rows.map(row)));
}

/** A term and what it is, for a list of facts. */
export const fact = (term, ...value) => element("div", {}, element("dt", {}, term), element("dd", {}, ...value));

/** Copies a text and says so on the button; where the page may not (plain HTTP from another machine), selects it to be copied by hand. */
export async function copy(text, shownIn, button) {
  const label = button.firstChild;
  const before = label.data;
  try {
    await navigator.clipboard.writeText(text);
    label.data = "Copied";
  } catch {
    shownIn.textContent = text;
    getSelection().selectAllChildren(shownIn);
    label.data = "Press Ctrl+C";
  }
  setTimeout(() => (label.data = before), 2000);
}
