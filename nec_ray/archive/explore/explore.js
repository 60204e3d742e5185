// The explorer's page: unpacks the tiles (columns.py says how), draws their map, and answers what is asked of a tile.
// Nothing is asked of anybody: what the page knows came with it. Whatever an archive names is shown by textContent.
"use strict";

const STATUS = ["valid", "nodata", "failed"];
const NO_PLACE = -(2 ** 31);
const MICRO = 1e6; // bounds are integers of a millionth of a degree
const SIMILAR = 10;
const FOUND = 20;

// Okabe and Ito's palette, which people of all kinds of colour vision can tell apart; shapes say the same again.
const STATUS_COLOUR = [[0, 114, 178], [240, 228, 66], [213, 94, 0]];
const BACKGROUND = [228, 231, 235];
const NONE = [150, 155, 160];
const VIRIDIS = [
  [68, 1, 84], [72, 36, 117], [65, 68, 135], [53, 95, 141], [42, 120, 142], [33, 145, 140], [34, 168, 132],
  [68, 191, 112], [122, 209, 81], [189, 223, 38], [253, 231, 37],
];

// ---- The tiles ----

const ARRAYS = {
  float64: Float64Array, int32: Int32Array, uint8: Uint8Array, uint16: Uint16Array, int8: Int8Array,
};

/** Columns by name, and the header, of the bytes that columns.py packed. */
async function unpack(gzipped) {
  const stream = new Blob([gzipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const decoder = new TextDecoder();
  const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, length)));
  const columns = {};
  for (const [name, { type, start, length: bytes }] of Object.entries(header.columns)) {
    const at = 4 + length + start;
    if (type === "texts") columns[name] = JSON.parse(decoder.decode(new Uint8Array(buffer, at, bytes)));
    else columns[name] = new ARRAYS[type](buffer, at, bytes / ARRAYS[type].BYTES_PER_ELEMENT);
  }
  return makeTiles(header, columns);
}

/** The tiles: their columns, where each one's pooled vector begins, and which of them share a footprint. */
function makeTiles(header, columns) {
  const count = header.tiles;
  const vectorStart = new Uint32Array(count);
  const footprint = new Int32Array(count).fill(-1);
  const footprints = [];
  const known = new Map();
  let start = 0;
  for (let i = 0; i < count; i++) {
    vectorStart[i] = start;
    if (columns.kind[i]) start += header.kinds[columns.kind[i] - 1].channels;
    if (columns.west[i] === NO_PLACE) continue;
    const bounds = [columns.west[i], columns.south[i], columns.east[i], columns.north[i]];
    const key = bounds.join();
    if (!known.has(key)) {
      known.set(key, footprints.length);
      footprints.push(bounds.map((edge) => edge / MICRO));
    }
    footprint[i] = known.get(key);
  }
  return { header, count, columns, vectorStart, footprint, footprints };
}

/** A text column's text of a tile, or null. */
function textOf(tiles, name, i) {
  const code = tiles.columns[name][i];
  return code < 0 ? null : tiles.columns[`${name}.texts`][code];
}

function vectorOf(tiles, i) {
  const kind = tiles.columns.kind[i];
  const channels = kind ? tiles.header.kinds[kind - 1].channels : 0;
  return tiles.columns.pooled.subarray(tiles.vectorStart[i], tiles.vectorStart[i] + channels);
}

/** Cosine of every tile's pooled vector with that of a tile; NaN where they cannot be compared. */
function cosines(tiles, like) {
  const { kind, pooled } = tiles.columns;
  const vector = vectorOf(tiles, like);
  const length = Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0));
  const found = new Float64Array(tiles.count).fill(NaN);
  if (!length) return found;
  for (let i = 0; i < tiles.count; i++) {
    if (kind[i] !== kind[like]) continue;
    let dot = 0, square = 0;
    for (let c = 0, at = tiles.vectorStart[i]; c < vector.length; c++, at++) {
      dot += vector[c] * pooled[at];
      square += pooled[at] * pooled[at];
    }
    found[i] = square ? dot / (length * Math.sqrt(square)) : 0;
  }
  return found;
}

/** The tiles most like another, the most similar first, as archive.similar orders them: [[tile, cosine], ...]. */
function similarTiles(tiles, like, k, among = cosines(tiles, like)) {
  const best = [];
  for (let i = 0; i < tiles.count; i++) {
    if (i === like || Number.isNaN(among[i])) continue;
    if (best.length === k && among[i] <= best[k - 1][1]) continue;
    let at = best.length;
    while (at > 0 && among[i] > best[at - 1][1]) at--;
    best.splice(at, 0, [i, among[i]]);
    if (best.length > k) best.pop();
  }
  return best;
}

/** Tiles whose id is, begins with, or holds a text. */
function findTiles(tiles, text) {
  const ids = tiles.columns.tile_id;
  const exact = [], first = [], within = [];
  for (let i = 0; i < ids.length && first.length < FOUND; i++) {
    if (ids[i] === text) exact.push(i);
    else if (ids[i].startsWith(text)) first.push(i);
    else if (within.length < FOUND && ids[i].includes(text)) within.push(i);
  }
  return [...exact, ...first, ...within].slice(0, FOUND);
}

// ---- What pulls a tile ----

// Control characters, directions of writing and the like: code must show what it does.
const HIDDEN = /[\p{C}\u2028\u2029]/gu;

/** A text as a literal of Python. */
function pythonText(text) {
  return JSON.stringify(text).replace(HIDDEN, (sign) => {
    const code = sign.codePointAt(0);
    return code > 0xffff ? `\\U${code.toString(16).padStart(8, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

/** A text as an expression of SQL. */
function sqlText(text) {
  const quoted = (part) => `'${part.replaceAll("'", "''")}'`;
  const hidden = [...text.matchAll(HIDDEN)].map((match) => `chr(${match[0].codePointAt(0)})`);
  if (!hidden.length) return quoted(text);
  return `(${text.split(HIDDEN).map((part, n) => [quoted(part), hidden[n]]).flat().filter((x) => x).join(" || ")})`;
}

function sqlOf(tiles, i) {
  const what = tiles.columns.status[i] === 0
    ? "tile_id, acquired_at, nec_decode(payload) AS embedding"
    : "tile_id, acquired_at, status, reason";
  return `SELECT ${what}\nFROM embeddings\nWHERE tile_id = ${sqlText(tiles.columns.tile_id[i])}`;
}

function pythonOf(tiles, i) {
  const { archive, version, where } = tiles.header;
  const id = pythonText(tiles.columns.tile_id[i]);
  const lines = ["import nec_ray", "", `archive = nec_ray.open_archive(${pythonText(archive)}, version=${version})`];
  if (tiles.columns.status[i] !== 0) {
    lines.push(`query = "SELECT status, reason FROM embeddings WHERE tile_id = ?"`);
    lines.push(`[(status, reason)] = archive.sql(query, [${id}]).fetchall()`);
    return lines.join("\n");
  }
  lines.push(`pull = archive.pull(tile_ids=[${id}])`, "embedding = pull.embeddings[0]");
  if (vectorOf(tiles, i).some((x) => x)) {
    const among = where ? `, where=${pythonText(where)}` : "";
    lines.push(`similar = archive.similar(${id}, k=${SIMILAR}${among})`);
  }
  return lines.join("\n");
}

// ---- Colours ----

function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[low].map((from, c) => Math.round(from + (place - low) * (VIRIDIS[low + 1][c] - from)));
}

/** Where 1 and 99 of 100 values lie; NaN is left out. */
function usual(values) {
  const sorted = values.filter((x) => !Number.isNaN(x)).sort();
  if (!sorted.length) return [0, 0];
  return [0.01, 0.99].map((share) => sorted[Math.round(share * (sorted.length - 1))]);
}

/** The number that a mode colours each tile by, NaN where it has none; null for modes that colour otherwise. */
function valuesOf(tiles, mode, chosen) {
  const { acquired_at: time, n_bytes: bytes, status, kind, colour } = tiles.columns;
  if (mode === "time") return time;
  if (mode === "bytes") return Float64Array.from(bytes, (x, i) => (status[i] ? NaN : x));
  if (mode === "component") return Float64Array.from(kind, (k, i) => (k ? colour[3 * i] : NaN));
  if (mode === "similarity" && chosen >= 0) return cosines(tiles, chosen);
  return null;
}

/** A colour a tile, uint8 (tiles x 3), and what the ends of the scale mean, null where there is no scale. */
function coloursOf(tiles, mode, chosen) {
  const colours = new Uint8Array(3 * tiles.count);
  const values = valuesOf(tiles, mode, chosen);
  const range = values && (mode === "component" ? [0, 255] : usual(values));
  const { status, kind, colour } = tiles.columns;
  const scale = Array.from({ length: 256 }, (_, n) => viridis(n / 255));
  for (let i = 0; i < tiles.count; i++) {
    let one = NONE;
    if (values) {
      const share = range[1] > range[0] ? (values[i] - range[0]) / (range[1] - range[0]) : 0.5;
      if (!Number.isNaN(values[i])) one = scale[Math.round(255 * Math.min(Math.max(share, 0), 1))];
    } else if (mode === "false") {
      if (kind[i]) one = colour.subarray(3 * i, 3 * i + 3);
    } else if (mode === "status") {
      one = STATUS_COLOUR[status[i]];
    }
    colours.set(one, 3 * i);
  }
  return { colours, range };
}

function packed([r, g, b]) {
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; // every browser's machine is little-endian
}

const DARK = packed([30, 34, 40]);

/** Fill a rectangle; tiles without embedding are also told by their shape: no-data has dots, failed has stripes. */
function fillRectangle(pixels, width, x0, y0, x1, y1, colour, status) {
  for (let y = y0; y < y1; y++) {
    pixels.fill(colour, y * width + x0, y * width + x1);
    if (!status) continue;
    for (let x = x0; x < x1; x++) {
      const dark = status === 2 ? (x + y) % 5 === 0 : x % 4 === 0 && y % 4 === 0;
      if (dark) pixels[y * width + x] = DARK;
    }
  }
}

// ---- The map ----

/** A plate carrée of which one can see a part: its middle and how many pixels a degree of latitude takes. */
class View {
  constructor(tiles) {
    const all = tiles.footprints;
    const edge = (n, pick) => all.reduce((found, bounds) => pick(found, bounds[n]), all[0][n]);
    const whole = () => [edge(0, Math.min), edge(1, Math.min), edge(2, Math.max), edge(3, Math.max)];
    this.bounds = all.length ? whole() : [-180, -90, 180, 90];
    this.width = this.height = 1;
    this.aspect = Math.cos((Math.min(75, Math.abs(this.bounds[1] + this.bounds[3]) / 2) * Math.PI) / 180);
    this.showAll();
  }

  showAll() {
    const [west, south, east, north] = this.bounds;
    this.lon = (west + east) / 2;
    this.lat = (south + north) / 2;
    const across = Math.max(1e-4, (east - west) * this.aspect), up = Math.max(1e-4, north - south);
    this.scale = 0.9 * Math.min(this.width / across, this.height / up);
  }

  x(lon) { return (lon - this.lon) * this.scale * this.aspect + this.width / 2; }
  y(lat) { return this.height / 2 - (lat - this.lat) * this.scale; }
  lonAt(x) { return this.lon + (x - this.width / 2) / (this.scale * this.aspect); }
  latAt(y) { return this.lat + (this.height / 2 - y) / this.scale; }

  move(dx, dy) {
    this.lon = Math.min(Math.max(this.lon - dx / (this.scale * this.aspect), -360), 540);
    this.lat = Math.min(Math.max(this.lat + dy / this.scale, -90), 90);
  }

  /** Zoom so that the place at a pixel stays there. */
  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const scale = Math.min(Math.max(this.scale * factor, 0.5), 1e8);
    const [lon, lat] = [this.lonAt(x), this.latAt(y)];
    this.scale = scale;
    this.lon = lon - (x - this.width / 2) / (scale * this.aspect);
    this.lat = lat - (this.height / 2 - y) / scale;
    this.move(0, 0);
  }
}

/** Of each footprint the tile that is drawn, -1 where none is shown: the one last acquired. */
function topTiles(tiles, shown) {
  const top = new Int32Array(tiles.footprints.length).fill(-1);
  const time = tiles.columns.acquired_at;
  for (let i = 0; i < tiles.count; i++) {
    const at = tiles.footprint[i];
    if (at < 0 || !shown[i]) continue;
    if (top[at] < 0 || !(time[i] < time[top[at]])) top[at] = i;
  }
  return top;
}

/** Draw the tiles into pixels (width x height, ABGR). */
function drawTiles(pixels, view, tiles, top, colours) {
  const { width, height } = view;
  pixels.fill(packed(BACKGROUND));
  for (const turn of [-360, 0, 360]) { // longitudes go on beyond 180 where a footprint lies across the antimeridian
    for (let at = 0; at < top.length; at++) {
      const i = top[at];
      if (i < 0) continue;
      const [west, south, east, north] = tiles.footprints[at];
      let x0 = Math.round(view.x(west + turn)), x1 = Math.round(view.x(east + turn));
      let y0 = Math.round(view.y(north)), y1 = Math.round(view.y(south));
      if (x1 < 0 || y1 < 0 || x0 >= width || y0 >= height) continue;
      if (x1 - x0 >= 6 && y1 - y0 >= 6) { // a line between tiles
        x1--;
        y1--;
      }
      const large = x1 - x0 >= 4 && y1 - y0 >= 4;
      x1 = Math.min(width, Math.max(x1, x0 + 2));
      y1 = Math.min(height, Math.max(y1, y0 + 2));
      x0 = Math.max(x0, 0);
      y0 = Math.max(y0, 0);
      const colour = packed(colours.subarray(3 * i, 3 * i + 3));
      fillRectangle(pixels, width, x0, y0, x1, y1, colour, large ? tiles.columns.status[i] : 0);
    }
  }
}

/** The shown tiles at a place, those drawn first, then by time, the last acquired first. */
function tilesAt(tiles, shown, top, lon, lat, reach) {
  const time = tiles.columns.acquired_at;
  const found = [];
  for (let i = 0; i < tiles.count; i++) {
    if (tiles.footprint[i] < 0 || !shown[i]) continue;
    const [west, south, east, north] = tiles.footprints[tiles.footprint[i]];
    if (lat < south - reach || lat > north + reach) continue;
    for (const turn of [-360, 0, 360]) {
      if (lon >= west + turn - reach && lon <= east + turn + reach) found.push(i);
    }
  }
  const drawn = (i) => top[tiles.footprint[i]] === i;
  return found.sort((a, b) => drawn(b) - drawn(a) || (time[b] || 0) - (time[a] || 0) || b - a);
}

/** A step of 1, 2 or 5 (or of the parts of a circle) such that at most so many lines stand in a span of degrees. */
function graticuleStep(span, most) {
  const steps = [90, 45, 30, 15, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 5e-4, 2e-4, 1e-4];
  let best = steps[0];
  for (const step of steps) if (span / step <= most) best = step;
  return best;
}

// ---- The page ----

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function number(value) {
  return value.toLocaleString("en", { maximumFractionDigits: 4 });
}

function isoTime(seconds) {
  const time = new Date(seconds * 1000);
  return Number.isNaN(time.getTime()) ? null : time.toISOString().replace(".000", "");
}

class Page {
  constructor(tiles) {
    this.tiles = tiles;
    this.view = new View(tiles);
    this.shown = new Uint8Array(tiles.count);
    this.chosen = -1;
    this.similar = [];
    this.here = [];
    this.canvas = document.getElementById("canvas");
    this.context = this.canvas.getContext("2d");
    this.introduce();
    this.listen();
    this.filter();
    this.recolour();
    new ResizeObserver(() => this.resize()).observe(this.canvas);
  }

  introduce() {
    const { archive, version, licence, attribution, where } = this.tiles.header;
    const about = [`version ${version}`, `${number(this.tiles.count)} tiles`];
    if (where) about.push(`where ${where}`);
    if (licence) about.push(`licence: ${licence}`);
    if (attribution) about.push(`attribution: ${attribution}`);
    document.title = `${archive} - nec archive explore`;
    document.querySelector("h1").textContent = archive;
    document.getElementById("about").textContent = about.join("; ");
    STATUS.forEach((name, n) => {
      const count = this.tiles.columns.status.reduce((sum, status) => sum + (status === n), 0);
      const box = element("input", { type: "checkbox", checked: true, id: `show-${name}` });
      box.addEventListener("change", () => this.filter());
      const swatch = element("canvas", { className: "swatch", width: 20, height: 20 });
      const image = new ImageData(20, 20);
      fillRectangle(new Uint32Array(image.data.buffer), 20, 0, 0, 20, 20, packed(STATUS_COLOUR[n]), n);
      swatch.getContext("2d").putImageData(image, 0, 0);
      const label = element("label", { className: "check" }, box, swatch, `${name} (${number(count)})`);
      document.getElementById("statuses").append(label);
    });
  }

  listen() {
    const on = (id, event, act) => document.getElementById(id).addEventListener(event, act);
    on("mode", "change", () => this.recolour());
    on("from", "change", () => this.filter());
    on("to", "change", () => this.filter());
    on("nearer", "click", () => this.zoom(1.6));
    on("farther", "click", () => this.zoom(1 / 1.6));
    on("all", "click", () => this.showAll());
    on("find", "submit", (event) => {
      event.preventDefault();
      this.find(document.getElementById("wanted").value.trim());
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.draw());
    this.canvas.addEventListener("blur", () => this.draw());
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), ...this.pixel(event));
    }, { passive: false });
    this.listenToPointers();
  }

  /** One pointer drags, or chooses where it does not move; two zoom. */
  listenToPointers() {
    const pointers = new Map();
    let moved = 0;
    const apart = () => {
      const [a, b] = [...pointers.values()];
      return Math.hypot(a[0] - b[0], a[1] - b[1]);
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (!pointers.size) moved = 0;
      pointers.set(event.pointerId, this.pixel(event));
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const from = pointers.get(event.pointerId);
      if (!from) return;
      const to = this.pixel(event);
      const before = pointers.size === 2 ? apart() : 0;
      pointers.set(event.pointerId, to);
      moved += Math.hypot(to[0] - from[0], to[1] - from[1]);
      this.view.move((to[0] - from[0]) / pointers.size, (to[1] - from[1]) / pointers.size);
      if (before) this.view.zoom(apart() / before, ...to);
      this.draw();
    });
    this.canvas.addEventListener("pointerup", (event) => {
      if (pointers.delete(event.pointerId) && !pointers.size && moved < 5 * this.ratio) this.pick(...this.pixel(event));
    });
    this.canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
  }

  pixel(event) {
    return [event.offsetX * this.ratio, event.offsetY * this.ratio];
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = Math.min(this.view.width, this.view.height) / 6;
    const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    const acts = {
      "+": () => this.zoom(1.6), "=": () => this.zoom(1.6), "-": () => this.zoom(1 / 1.6), "0": () => this.showAll(),
      Enter: () => this.pick(this.view.width / 2, this.view.height / 2),
      Escape: () => this.choose(-1),
      n: () => this.stepHere(1), p: () => this.stepHere(-1),
    };
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (moves[name]) {
      this.view.move(...moves[name]);
      this.draw();
    } else if (acts[name]) {
      acts[name]();
    } else {
      return;
    }
    event.preventDefault();
  }

  zoom(factor, x, y) {
    this.view.zoom(factor, x, y);
    this.draw();
  }

  showAll() {
    this.view.showAll();
    this.draw();
  }

  resize() {
    const first = this.ratio === undefined;
    this.ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(this.canvas.clientWidth * this.ratio));
    const height = Math.max(1, Math.round(this.canvas.clientHeight * this.ratio));
    if (!first && width === this.view.width && height === this.view.height) return;
    this.canvas.width = this.view.width = width;
    this.canvas.height = this.view.height = height;
    this.image = new ImageData(width, height);
    if (first) this.view.showAll();
    this.draw();
  }

  /** Which tiles are shown, by status and time. */
  filter() {
    const { status, acquired_at: time } = this.tiles.columns;
    const wanted = STATUS.map((name) => document.getElementById(`show-${name}`).checked);
    const [from, to] = ["from", "to"].map((id) => document.getElementById(id).valueAsNumber / 1000);
    let count = 0, nowhere = 0;
    for (let i = 0; i < this.tiles.count; i++) {
      let fits = wanted[status[i]];
      if (!Number.isNaN(from)) fits = fits && time[i] >= from;
      if (!Number.isNaN(to)) fits = fits && time[i] < to + 86400; // the whole last day
      this.shown[i] = fits ? 1 : 0;
      if (fits) count++;
      if (fits && this.tiles.footprint[i] < 0) nowhere++;
    }
    this.top = topTiles(this.tiles, this.shown);
    const stacked = count - nowhere - this.top.reduce((sum, i) => sum + (i >= 0), 0);
    const says = [`${number(count)} of ${number(this.tiles.count)} tiles shown`];
    if (stacked) says.push(`below one acquired later: ${number(stacked)}`);
    if (nowhere) says.push(`without a place: ${number(nowhere)}`);
    document.getElementById("shown").textContent = says.join("; ");
    this.draw();
  }

  recolour() {
    const mode = document.getElementById("mode").value;
    const { colours, range } = coloursOf(this.tiles, mode, this.chosen);
    this.colours = colours;
    this.legend(mode, range);
    this.draw();
  }

  legend(mode, range) {
    const legend = document.getElementById("legend");
    const kinds = this.tiles.header.kinds;
    const says = [];
    if (range) {
      const bar = element("canvas", { width: 256, height: 1 });
      const image = new ImageData(256, 1);
      new Uint32Array(image.data.buffer).set(Array.from({ length: 256 }, (_, n) => packed(viridis(n / 255))));
      bar.getContext("2d").putImageData(image, 0, 0);
      const end = { time: (x) => isoTime(x) ?? "", bytes: (x) => `${number(x)} bytes`, component: () => "" }[mode];
      const beyond = mode === "component" ? ["low", "high"] : ["\u2264 ", "\u2265 "];
      const ends = range.map((x, n) => element("span", {}, beyond[n] + (end ?? number)(x)));
      says.push(bar, element("div", { className: "ends" }, ...ends));
    }
    if (mode === "similarity" && !range) says.push(element("p", {}, "Choose a tile first."));
    if (mode === "false" || mode === "component") {
      const share = (kind) => kind.shares.slice(0, mode === "false" ? 3 : 1).map((x) => `${Math.round(100 * x)}%`);
      const text = kinds.map((kind) => share(kind).join(", ")).join("; ");
      const what = mode === "false" ? "Red, green, blue: components with" : "A component with";
      says.push(element("p", {}, kinds.length ? `${what} ${text} of the variance` : "No tile has a pooled vector."));
      if (kinds.length > 1) says.push(element("p", {}, "Colours of different encoders cannot be compared."));
    }
    if (mode !== "status") says.push(element("p", {}, "Grey: tiles without such a value."));
    legend.replaceChildren(...says);
  }

  /** Draw at the next chance, once however often it is asked for. */
  draw() {
    if (this.drawing || !this.image || !this.colours) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      const began = performance.now();
      drawTiles(new Uint32Array(this.image.data.buffer), this.view, this.tiles, this.top, this.colours);
      this.context.putImageData(this.image, 0, 0);
      this.graticule();
      this.marks();
      this.canvas.dataset.milliseconds = (performance.now() - began).toFixed(1);
    });
  }

  graticule() {
    const { context, view, ratio } = this;
    const [west, east, south, north] = [view.lonAt(0), view.lonAt(view.width), view.latAt(view.height), view.latAt(0)];
    const step = graticuleStep(Math.max(east - west, north - south), 8);
    const digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
    context.lineWidth = ratio;
    context.font = `${12 * ratio}px system-ui, sans-serif`;
    context.strokeStyle = "rgba(30, 34, 40, 0.35)";
    const label = (text, x, y) => {
      context.save();
      context.lineWidth = 3 * ratio;
      context.strokeStyle = "#fff";
      context.fillStyle = "#16191d";
      context.strokeText(text, x, y);
      context.fillText(text, x, y);
      context.restore();
    };
    const line = (x0, y0, x1, y1) => {
      context.beginPath();
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
      context.stroke();
    };
    for (let n = Math.ceil(west / step); n <= east / step; n++) {
      const x = view.x(n * step);
      line(x, 0, x, view.height);
      const lon = ((n * step + 540) % 360 + 360) % 360 - 180;
      label(`${Math.abs(lon).toFixed(digits)}°${lon < 0 ? "W" : "E"}`, x + 3 * ratio, view.height - 6 * ratio);
    }
    for (let n = Math.ceil(Math.max(south, -90) / step); n <= Math.min(north, 90) / step; n++) {
      const y = view.y(n * step);
      line(0, y, view.width, y);
      label(`${Math.abs(n * step).toFixed(digits)}°${n < 0 ? "S" : "N"}`, 4 * ratio, y - 4 * ratio);
    }
  }

  /** The similar tiles with their ranks, the chosen one, and the middle while keys are at work. */
  marks() {
    const { context, view, ratio } = this;
    const numbers = [];
    const frame = (i, colour, text) => {
      const at = this.tiles.footprint[i];
      if (at < 0) return;
      const [west, south, east, north] = this.tiles.footprints[at];
      for (const turn of [-360, 0, 360]) {
        const least = 8 * ratio;
        const across = Math.max(view.x(east) - view.x(west), least);
        const up = Math.max(view.y(south) - view.y(north), least);
        const x = view.x((west + east) / 2 + turn) - across / 2, y = view.y((south + north) / 2) - up / 2;
        if (x > view.width || y > view.height || x + across < 0 || y + up < 0) continue;
        for (const [width, style] of [[5, "#fff"], [3, "#16191d"], [2, colour]]) {
          context.lineWidth = width * ratio;
          context.strokeStyle = style;
          context.strokeRect(x, y, across, up);
        }
        if (text) numbers.push([text, x + (across > 26 * ratio ? 5 * ratio : across + 3 * ratio), y + 14 * ratio]);
      }
    };
    [...this.similar.entries()].reverse().forEach(([n, [i]]) => frame(i, "#cc79a7", String(n + 1)));
    if (this.chosen >= 0) frame(this.chosen, "#e69f00", "");
    this.writeApart(numbers.reverse());
    if (this.canvas.matches(":focus-visible")) {
      const [x, y, arm] = [view.width / 2, view.height / 2, 9 * ratio];
      for (const [width, style] of [[4, "#fff"], [2, "#16191d"]]) {
        context.lineWidth = width * ratio;
        context.strokeStyle = style;
        context.beginPath();
        context.moveTo(x - arm, y);
        context.lineTo(x + arm, y);
        context.moveTo(x, y - arm);
        context.lineTo(x, y + arm);
        context.stroke();
      }
    }
  }

  /** Write texts [text, x, y], but for those that would lie on an earlier one. */
  writeApart(texts) {
    const { context, ratio } = this;
    const written = [];
    context.font = `bold ${12 * ratio}px system-ui, sans-serif`;
    context.lineWidth = 3 * ratio;
    context.strokeStyle = "#fff";
    context.fillStyle = "#16191d";
    for (const [text, x, y] of texts) {
      if (written.some(([u, v]) => Math.abs(u - x) < 18 * ratio && Math.abs(v - y) < 14 * ratio)) continue;
      context.strokeText(text, x, y);
      context.fillText(text, x, y);
      written.push([x, y]);
    }
  }

  pick(x, y) {
    const reach = (4 * this.ratio) / this.view.scale;
    const at = (within) =>
      tilesAt(this.tiles, this.shown, this.top, this.view.lonAt(x), this.view.latAt(y), within);
    const exact = at(0);
    this.here = exact.length ? exact : at(reach);
    this.choose(this.here[0] ?? -1);
  }

  stepHere(step) {
    const at = this.here.indexOf(this.chosen);
    if (at >= 0) this.choose(this.here[(at + step + this.here.length) % this.here.length]);
  }

  /** Choose a tile that may lie outside of what is seen. */
  goTo(i) {
    this.here = [i];
    const at = this.tiles.footprint[i];
    if (at >= 0) {
      const [west, south, east, north] = this.tiles.footprints[at];
      const [x, y] = [this.view.x((west + east) / 2), this.view.y((south + north) / 2)];
      if (x < 0 || y < 0 || x > this.view.width || y > this.view.height) {
        this.view.lon = (west + east) / 2;
        this.view.lat = (south + north) / 2;
      }
    }
    this.choose(i);
  }

  find(text) {
    const found = text ? findTiles(this.tiles, text) : [];
    const list = document.getElementById("found");
    list.replaceChildren(...found.map((i) => this.tileButton(i)));
    if (text && !found.length) list.append(element("li", {}, "No tile has this in its id."));
    if (found.length && this.tiles.columns.tile_id[found[0]] === text) this.goTo(found[0]);
  }

  tileButton(i, ...before) {
    const name = element("span", { className: "text" }, this.tiles.columns.tile_id[i]);
    const button = element("button", { type: "button" }, ...before, name);
    button.addEventListener("click", () => this.goTo(i));
    return element("li", {}, button);
  }

  choose(i) {
    this.chosen = i;
    this.similar = i >= 0 ? similarTiles(this.tiles, i, SIMILAR) : [];
    const panel = document.getElementById("tile");
    const nothing = "No tile chosen: take another place on the map, or find a tile by its id.";
    const hadFocus = panel.contains(document.activeElement);
    if (i < 0) panel.replaceChildren(element("p", {}, nothing));
    else panel.replaceChildren(...this.describe(i));
    if (hadFocus) document.getElementById("chosen")?.focus(); // the button that had it is gone
    const name = i < 0 ? nothing : `${STATUS[this.tiles.columns.status[i]]} tile ${this.tiles.columns.tile_id[i]}`;
    document.getElementById("said").textContent = name;
    if (document.getElementById("mode").value === "similarity") this.recolour();
    this.draw();
  }

  describe(i) {
    const parts = [];
    if (this.here.length > 1) {
      const at = this.here.indexOf(i);
      const step = (name, by) => {
        const button = element("button", { type: "button" }, name);
        button.addEventListener("click", () => this.stepHere(by));
        return button;
      };
      const place = `tile ${at + 1} of ${this.here.length} here`;
      parts.push(element("div", { className: "here" }, step("Previous", -1), place, step("Next", 1)));
    }
    const name = this.tiles.columns.tile_id[i];
    parts.push(element("h2", { className: "text", id: "chosen", tabIndex: -1 }, name), this.facts(i));
    if (this.similar.length) {
      const list = element("ol", { className: "tiles", id: "similar" });
      this.similar.forEach(([other, cosine], n) => {
        list.append(this.tileButton(other, element("b", {}, `${n + 1}.`), element("b", {}, cosine.toFixed(3))));
      });
      parts.push(element("h3", {}, "Similar tiles (cosine)"), list);
    }
    parts.push(...this.code("SQL", "sql", sqlOf(this.tiles, i)));
    parts.push(...this.code("Python", "python", pythonOf(this.tiles, i)));
    return parts;
  }

  facts(i) {
    const { columns } = this.tiles;
    const at = this.tiles.footprint[i];
    const grid = columns.grid_rows[i] ? `${columns.grid_rows[i]} x ${columns.grid_cols[i]} tokens` : null;
    const share = columns.nodata_share[i];
    const rows = [
      ["status", STATUS[columns.status[i]]],
      ["reason", textOf(this.tiles, "reason", i)],
      ["acquired", isoTime(columns.acquired_at[i])],
      ["label", textOf(this.tiles, "label", i)],
      ["bytes", columns.status[i] ? null : number(columns.n_bytes[i])],
      ["west, south", at < 0 ? null : this.tiles.footprints[at].slice(0, 2).map((x) => x.toFixed(5)).join(", ")],
      ["east, north", at < 0 ? null : this.tiles.footprints[at].slice(2).map((x) => x.toFixed(5)).join(", ")],
      ["grid", grid],
      ["no data", Number.isNaN(share) ? null : `${number(100 * share)}%`],
      ["sensor", textOf(this.tiles, "sensor", i)],
      ["source", textOf(this.tiles, "source", i)],
      ["CRS", textOf(this.tiles, "crs", i)],
      ["codec", textOf(this.tiles, "codec_id", i)],
      ["encoded", isoTime(columns.encoded_at[i])],
      ["encoded from", textOf(this.tiles, "encoded_from", i)],
    ];
    const list = element("dl");
    for (const [name, value] of rows) {
      if (value !== null) list.append(element("dt", {}, name), element("dd", { className: "text" }, value));
    }
    return list;
  }

  code(title, id, text) {
    const block = element("pre", { id, tabIndex: 0 }, text);
    const button = element("button", { type: "button" }, `Copy ${title}`);
    button.addEventListener("click", async () => {
      getSelection().selectAllChildren(block); // what is left to the user where a browser keeps the clipboard to itself
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Selected: copy it with Ctrl+C";
      }
    });
    return [element("h3", {}, title), block, button];
  }
}

/** The packed tiles: in the page, or beside it where it is served. */
async function load() {
  const source = document.getElementById("tiles");
  if (source.dataset.src) {
    const answer = await fetch(source.dataset.src);
    if (!answer.ok) throw new Error(`${source.dataset.src}: ${answer.status}`);
    return new Uint8Array(await answer.arrayBuffer());
  }
  const text = atob(source.textContent);
  source.textContent = "";
  return Uint8Array.from(text, (sign) => sign.charCodeAt(0));
}

if (typeof document !== "undefined") { // tests run the functions above without a page
  load().then(unpack).then((tiles) => {
    window.explorer = new Page(tiles);
    document.body.dataset.ready = "yes";
  }).catch((error) => {
    const why = `The tiles cannot be read (${error.message}).`;
    document.getElementById("about").replaceChildren(element("span", { id: "error" }, why));
  });
}
