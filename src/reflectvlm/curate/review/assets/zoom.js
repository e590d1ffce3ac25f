// An image by itself: as large as fits, or in steps of its own pixels.
const zoom = { place: 0, number: 0, scale: 0 };

function openZoom(place, number) {
  const dialog = byId("zoom");
  Object.assign(zoom, { place, number, scale: 0 });
  const picture = make("img", { src: `image/${place}/${number}`, alt: `Image ${number + 1}, enlarged`, draggable: "false" });
  picture.addEventListener("load", scaled);
  picture.addEventListener("click", () => stepZoom(zoom.scale ? 0 : 2));
  replace(byId("zoomed"), picture);
  if (!dialog.open) dialog.showModal();
  byId("zoomed").focus();
}

// 0: whole image in the window, small ones enlarged up to eight times.
function scaled() {
  const box = byId("zoomed"), picture = box.firstElementChild;
  if (!picture.naturalWidth) return;
  const fit = Math.min(box.clientWidth / picture.naturalWidth, box.clientHeight / picture.naturalHeight, 8);
  const scale = fit * (zoom.scale || 1);
  picture.style.setProperty("width", `${Math.max(1, Math.floor(picture.naturalWidth * scale))}px`);
  picture.classList.toggle("pixels", scale >= 3);
  byId("zoom-told").textContent = `Image ${zoom.number + 1} of ${seen.row.images} · ${picture.naturalWidth} × ${picture.naturalHeight} · ${Math.round(100 * scale)} %`;
}

function stepZoom(scale) {
  zoom.scale = scale > 12 ? 12 : scale < 1.05 ? 0 : scale;
  scaled();
}

function zoomKey(event) {
  const box = byId("zoomed"), far = 80;
  const pan = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] }[event.key];
  if (pan) box.scrollBy(...pan);
  else if (event.key === "+" || event.key === "=") stepZoom((zoom.scale || 1) * 1.5);
  else if (event.key === "-") stepZoom((zoom.scale || 1) / 1.5);
  else if (event.key === "0") stepZoom(0);
  else if (event.key === "n" && seen.row.images > 1) openZoom(zoom.place, (zoom.number + 1) % seen.row.images);
  else if (event.key === "z") byId("zoom").close();
  else return;
  event.preventDefault();
}

function zoomDialog() {
  return make("dialog", { id: "zoom", "aria-label": "Image", onkeydown: zoomKey },
    make("div", { class: "bar" },
      make("span", { id: "zoom-told", class: "faint" }),
      make("span", { class: "keys faint" }, key("+"), " ", key("−"), " ", key("0"), " zoom  ", key("n"), " next image  ", key("Esc"), " close"),
      make("button", { onclick: () => byId("zoom").close() }, "Close")),
    make("div", { id: "zoomed", tabindex: "0", "aria-label": "Image; arrow keys move it" }));
}
