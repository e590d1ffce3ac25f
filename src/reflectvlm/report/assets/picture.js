// Pictures: whole, with the cells of a block, and with a heat map over them.
const HEAT = [255, 120, 0];

function picture(image, label) {
  const source = DATA.images[image];
  if (!source) return null;
  const canvas = make("canvas", { class: "heat", "aria-hidden": "true" });
  const note = make("figcaption", { class: "faint" });
  const img = make("img", { src: source, alt: label, draggable: "false", onload: () => { if (img.naturalWidth < 160) img.classList.add("small"); } });
  const node = make("figure", { class: "picture" }, make("div", { class: "frame" }, img, canvas), note);
  return { node, image, heat: (rows, columns, levels, text) => heatOn(canvas, rows, columns, levels, note, text), clear: () => { canvas.width = canvas.width; canvas.dataset.token = ""; note.textContent = ""; } };
}

// One pixel a cell; the style sheet scales it to the picture without blur.
function heatOn(canvas, rows, columns, levels, note, text) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const level = levels[i] / 255;
    pixels.data.set([HEAT[0], Math.round(HEAT[1] + 110 * (1 - level)), HEAT[2], Math.round(215 * level ** 0.8)], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  note.textContent = text;
}

// A small picture of which all cells are veiled that the block does not keep.
function cellsPicture(image, grid, keep, width) {
  const [frames, rows, columns] = grid;
  const height = Math.max(1, Math.round((width * rows) / columns));
  const canvas = make("canvas", { class: "cells", width: 2 * width, height: 2 * height, "aria-hidden": "true", vars: { width: `${width}px`, height: `${height}px` } });
  const context = canvas.getContext("2d");
  const kept = keep === null ? null : new Set(keep.map((cell) => cell % (rows * columns)));
  const veil = () => {
    for (let cell = 0; kept && cell < rows * columns; cell++) {
      const [x, y] = [cell % columns, Math.floor(cell / columns)];
      const box = [Math.floor((x * canvas.width) / columns), Math.floor((y * canvas.height) / rows)];
      context.fillStyle = kept.has(cell) ? "rgba(0,0,0,0)" : "rgba(120,128,140,0.86)";
      context.fillRect(...box, Math.floor(((x + 1) * canvas.width) / columns) - box[0], Math.floor(((y + 1) * canvas.height) / rows) - box[1]);
    }
    canvas.dataset.drawn = "1";
  };
  if (DATA.images[image]) {
    const img = new Image();
    img.onload = () => { context.imageSmoothingEnabled = img.naturalWidth >= 160; context.drawImage(img, 0, 0, canvas.width, canvas.height); veil(); };
    img.src = DATA.images[image];
  } else {
    context.fillStyle = "rgb(60,130,246)";
    context.fillRect(0, 0, canvas.width, canvas.height);
    veil();
  }
  return canvas;
}
