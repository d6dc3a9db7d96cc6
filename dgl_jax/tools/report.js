"use strict";

// Copies text; pages opened from the file system may lack the clipboard of the browser.
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.style.position = "fixed";
    area.style.opacity = "0";
    document.body.append(area);
    area.select();
    let done = false;
    try {
      done = document.execCommand("copy");
    } catch {
      done = false;
    }
    area.remove();
    return done;
  }
}

for (const button of document.querySelectorAll("button.copy")) {
  const label = button.textContent;
  button.addEventListener("click", async () => {
    const codes = document.getElementById(button.dataset.from).querySelectorAll("code");
    const text = [...codes].map((code) => code.textContent).join("\n");
    button.textContent = (await copyText(text)) ? "copied" : "not copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  });
}

for (const head of document.querySelectorAll("th button")) {
  head.addEventListener("click", () => {
    const cell = head.closest("th");
    const body = cell.closest("table").tBodies[0];
    const up = cell.getAttribute("aria-sort") !== "ascending";
    for (const other of cell.parentElement.children) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[cell.cellIndex].dataset.sort;
    const text = (row) => row.cells[cell.cellIndex].textContent;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      // Rows without a number stay at the end in both directions.
      if ((x === undefined) !== (y === undefined)) return x === undefined ? 1 : -1;
      const result = x === undefined
        ? text(a).localeCompare(text(b), undefined, { numeric: true })
        : x - y;
      return up ? result : -result;
    };
    body.append(...[...body.rows].sort(order));
  });
}

for (const box of document.querySelectorAll(".legend input")) {
  box.addEventListener("change", () => {
    const lines = box.closest("figure").querySelectorAll(`[data-line="${box.value}"]`);
    for (const line of lines) line.classList.toggle("hidden", !box.checked);
  });
  box.dispatchEvent(new Event("change"));
}

for (const button of document.querySelectorAll("button.all")) {
  button.addEventListener("click", () => {
    const boxes = [...button.closest("form").querySelectorAll("input")];
    const checked = !boxes.some((box) => box.checked);
    for (const box of boxes) {
      box.checked = checked;
      box.dispatchEvent(new Event("change"));
    }
  });
}
