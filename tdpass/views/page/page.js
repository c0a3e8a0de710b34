(function () {
  "use strict";
  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const shown = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = shown === "dark" ? "light" : "dark";
  });

  const sites = document.getElementById("sites-table");
  if (!sites) return;
  const body = sites.tBodies[0];
  const lines = Array.from(body.rows);
  const network = lines.filter((row) => !row.classList.contains("block-row"));
  const headers = Array.from(sites.tHead.rows[0].cells);
  let column = -1;
  let direction = 1;

  function key(row, index) {
    const data = row.cells[index].dataset;
    return data.key !== undefined ? data.key : data[document.querySelector("input[name=measure]:checked").value];
  }
  function compare(a, b) {
    return a !== "" && b !== "" && !isNaN(a) && !isNaN(b) ? a - b : a.localeCompare(b, undefined, { numeric: true });
  }
  function arrange() {
    const rows = column < 0 ? lines : network.slice().sort((a, b) => direction * compare(key(a, column), key(b, column)));
    body.replaceChildren(...rows);
    headers.forEach((header, index) => {
      if (index === column) header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else header.removeAttribute("aria-sort");
    });
  }
  headers.forEach((header, index) => {
    if (!network.length || key(network[0], index) === undefined) return;
    const button = document.createElement("button");
    const first = header.classList.contains("number") ? -1 : 1;
    button.type = "button";
    button.textContent = header.textContent;
    button.title = "Sort; a third press restores the order of the network";
    button.addEventListener("click", () => {
      if (column !== index) { column = index; direction = first; }
      else if (direction === first) direction = -first;
      else column = -1;
      arrange();
    });
    header.replaceChildren(button);
  });
  document.querySelectorAll("input[name=measure]").forEach((input) => input.addEventListener("change", arrange));

  const box = document.getElementById("filter-box");
  const filter = document.getElementById("filter");
  const count = document.getElementById("filter-count");
  box.hidden = network.length < 8;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    lines.forEach((row) => { row.hidden = wanted !== ""; });
    network.forEach((row) => {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      if (!row.hidden) shown += 1;
    });
    count.textContent = wanted ? shown + " of " + network.length : "";
  });

  const details = document.getElementById("site-details");
  const cells = Array.from(document.querySelectorAll(".cell"));
  function entry(title, cell, wide) {
    const term = document.createElement("dt");
    const value = document.createElement("dd");
    const box = document.createElement("div");
    term.textContent = title;
    value.append(...Array.from(cell.childNodes, (node) => node.cloneNode(true)));
    if (wide) box.className = "wide";
    box.append(term, value);
    return box;
  }
  function show(cell) {
    const row = document.querySelector(cell.hash);
    const name = document.createElement("h4");
    const list = document.createElement("dl");
    const there = document.createElement("a");
    name.textContent = row.cells[0].dataset.key;
    headers.forEach((header, index) => {
      if (index && !header.classList.contains("bars") && row.cells[index].textContent) {
        list.append(entry(header.textContent, row.cells[index], header.textContent === "Reason"));
      }
    });
    there.href = cell.hash;
    there.textContent = "its row in the table";
    details.replaceChildren(name, list, there);
    details.hidden = false;
    cells.forEach((each) => each.toggleAttribute("aria-current", each === cell));
  }
  cells.forEach((cell, index) => {
    cell.addEventListener("click", (event) => { event.preventDefault(); show(cell); });
    cell.addEventListener("keydown", (event) => {
      const next = cells[index + { ArrowRight: 1, ArrowLeft: -1 }[event.key]];
      if (next) { event.preventDefault(); next.focus(); show(next); }
    });
  });
})();
