// Counters, gauges and histograms in the Prometheus text format, and the families of both roles. Who counts what is not
// known here.

package main

import (
	"bytes"
	"fmt"
	"math"
	"net/http"
	"os"
	"runtime"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A registry is an ordered list of metric families and the handler that shows them in the Prometheus text format 0.0.4,
// followed by the families of the process itself. Two roles in one process share one registry.
//
// Everything is registered before the first request; the list has no lock because it never changes afterwards. Counting
// and scraping are safe for concurrent use.
type registry struct {
	families []family
	requests *counterVec // HTTP requests, by code
	build    []string    // label pairs of sidecast_build_info
	start    float64     // Unix time in seconds
	proc     string      // where Linux shows the process; may not exist
}

// A family is one metric name: its HELP and TYPE lines, and what writes its samples.
type family struct {
	name, help, kind string
	samples          func(b *bytes.Buffer)
}

// A label is a name and every value that it may ever have, each once. All series exist at 0 from the start, because
// rate() and increase() do not see the step from absent to 1; no input can ever add one.
type label struct {
	name   string
	values []string
}

// newRegistry returns a registry without families but those of servers and the process, whose start is the time of this
// call: milliseconds late, but the same on every system and at every scrape. Calculated from /proc (boot time plus
// start ticks) it would be no finer than a second, move with each correction of the clock, and need /proc.
func newRegistry(version string) *registry {
	r := &registry{
		build: []string{labelPair("version", version), labelPair("goversion", runtime.Version())},
		start: float64(time.Now().UnixMilli()) / 1000,
		proc:  "/proc",
	}
	r.requests = r.counters("http_requests_total", "Requests answered, but for streams and events, by status; 401 is not in 4xx.",
		label{"code", []string{"2xx", "3xx", "4xx", "401", "5xx"}})
	return r
}

// counters registers a counter for each combination of the labels' values; without labels there is one.
func (r *registry) counters(name, help string, labels ...label) *counterVec {
	sets := combinations(labels)
	v := &counterVec{name: name, labels: labels, cells: make([]counter, len(sets))}
	r.add(family{name, help, "counter", func(b *bytes.Buffer) {
		for i, pairs := range sets {
			writeSample(b, name, float64(v.cells[i].n.Load()), pairs...)
		}
	}})
	return v
}

// histograms registers a histogram for each combination of the labels' values. The buckets are upper bounds in seconds,
// strictly ascending and finite; the one for +Inf is added.
func (r *registry) histograms(name, help string, buckets []float64, labels ...label) *histogramVec {
	sets, bounds := combinations(labels), append(slices.Clone(buckets), math.Inf(1))
	v := &histogramVec{name: name, labels: labels, cells: make([]histogram, len(sets))}
	for i := range v.cells {
		v.cells[i].bounds, v.cells[i].counts = bounds, make([]uint64, len(bounds))
	}
	r.add(family{name, help, "histogram", func(b *bytes.Buffer) {
		for i, pairs := range sets {
			v.cells[i].samples(b, name, pairs)
		}
	}})
	return v
}

// gauge registers a gauge whose values, by label value, are read at each scrape. The registry holds no lock then, so
// read may take its own; it must be safe for concurrent use. A label value that is not in the map is 0, a key that is
// not a label value is ignored. With a zero label there is one series, under the key "".
func (r *registry) gauge(name, help string, l label, read func() map[string]float64) {
	r.add(family{name, help, "gauge", func(b *bytes.Buffer) {
		current := read()
		if l.name == "" {
			writeSample(b, name, current[""])
		}
		for _, value := range l.values {
			writeSample(b, name, current[value], labelPair(l.name, value))
		}
	}})
}

// add appends a family. It panics on a name that is taken, since a scraper would refuse the whole page.
func (r *registry) add(f family) {
	if slices.ContainsFunc(r.families, func(other family) bool { return other.name == f.name }) {
		panic("metrics: " + f.name + " is registered twice")
	}
	r.families = append(r.families, f)
}

// ServeHTTP renders all families to memory before it writes, so that a slow scraper delays nobody.
func (r *registry) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	var b bytes.Buffer
	for _, f := range r.families {
		f.write(&b)
	}
	r.writeProcess(&b)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Write(b.Bytes()) // the only error is a scraper that left
}

// writeProcess writes the families of the process. One that cannot be read is left out: in a chroot there is no /proc,
// and a process out of file descriptors cannot open it.
func (r *registry) writeProcess(b *bytes.Buffer) {
	gauge := func(name, help string, value float64, pairs ...string) {
		family{name, help, "gauge", func(b *bytes.Buffer) { writeSample(b, name, value, pairs...) }}.write(b)
	}
	gauge("process_start_time_seconds", "Start of the process since the Unix epoch in seconds.", r.start)
	statm, _ := os.ReadFile(r.proc + "/self/statm") // proc(5): total and resident size in pages, and more
	var size, resident float64
	if _, err := fmt.Sscan(string(statm), &size, &resident); err == nil {
		gauge("process_resident_memory_bytes", "Resident memory in bytes.", resident*float64(os.Getpagesize()))
	}
	if dir, err := os.Open(r.proc + "/self/fd"); err == nil {
		if names, err := dir.Readdirnames(-1); err == nil {
			gauge("process_open_fds", "Open file descriptors.", float64(len(names)-1)) // less dir itself
		}
		dir.Close()
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err == nil {
		gauge("process_max_fds", "Limit of open file descriptors.", float64(limit.Cur))
	}
	// Unlike runtime.ReadMemStats, this does not stop the world.
	live := []runtimemetrics.Sample{{Name: "/sched/goroutines:goroutines"}, {Name: "/memory/classes/heap/objects:bytes"}}
	runtimemetrics.Read(live)
	gauge("go_goroutines", "Goroutines that exist.", float64(live[0].Value.Uint64()))
	gauge("go_memstats_heap_alloc_bytes", "Heap memory in use by objects in bytes.", float64(live[1].Value.Uint64()))
	gauge("sidecast_build_info", "Always 1; the labels tell the build.", 1, r.build...)
}

// A vec holds one counter or histogram for each combination of label values, in the order of combinations.
type vec[T any] struct {
	name   string
	labels []label
	cells  []T
}

type counterVec = vec[counter]
type histogramVec = vec[histogram]

// with returns the handle for one value of each label, in the order of registration, without allocating. A value
// outside of the closed set, or a wrong number of values, is a programming error: it panics.
func (v *vec[T]) with(values ...string) *T {
	if len(values) != len(v.labels) {
		panic("metrics: " + v.name + ": wrong number of label values")
	}
	cell := 0
	for i, l := range v.labels {
		n := slices.Index(l.values, values[i])
		if n < 0 {
			panic("metrics: " + v.name + ": no " + l.name + " " + strconv.Quote(values[i]))
		}
		cell = cell*len(l.values) + n
	}
	return &v.cells[cell]
}

// combinations returns the label pairs of every series; the last label's values change fastest. Without labels there is
// one series, without pairs.
func combinations(labels []label) [][]string {
	sets := [][]string{nil}
	for _, l := range labels {
		var longer [][]string
		for _, set := range sets {
			for _, value := range l.values {
				longer = append(longer, slices.Concat(set, []string{labelPair(l.name, value)}))
			}
		}
		sets = longer
	}
	return sets
}

// A counter only grows, and starts at 0 with the process. It never allocates and is safe for concurrent use.
type counter struct{ n atomic.Uint64 }

func (c *counter) Inc()         { c.n.Add(1) }
func (c *counter) Add(n uint64) { c.n.Add(n) }
func (c *counter) Load() uint64 { return c.n.Load() }

// A histogram counts durations by size. It is safe for concurrent use.
type histogram struct {
	bounds []float64 // upper bounds in seconds, the last is +Inf; shared by the family, never written

	// mu guards counts and sum, which always tell of the same observations.
	mu     sync.Mutex
	counts []uint64 // by bucket, not yet cumulative
	sum    float64  // seconds
}

// observe counts one duration, in the first bucket whose bound is not below it. What is negative or not a number counts
// as 0: the sum is a counter too, and must not fall.
func (h *histogram) observe(seconds float64) {
	if !(seconds > 0) {
		seconds = 0
	}
	bucket, _ := slices.BinarySearch(h.bounds, seconds)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[bucket]++
	h.sum += seconds
}

// samples writes one moment of the histogram: cumulative buckets up to le="+Inf", which equals _count, between them
// _sum (Prometheus text format, "Histograms and summaries").
func (h *histogram) samples(b *bytes.Buffer, name string, pairs []string) {
	h.mu.Lock()
	counts, sum := slices.Clone(h.counts), h.sum
	h.mu.Unlock()

	var total uint64
	for i, n := range counts {
		total += n
		le := labelPair("le", formatFloat(h.bounds[i]))
		writeSample(b, name+"_bucket", float64(total), slices.Concat(pairs, []string{le})...)
	}
	writeSample(b, name+"_sum", sum, pairs...)
	writeSample(b, name+"_count", float64(total), pairs...)
}

// In HELP only backslash and newline are escaped, in a label value also the quote (Prometheus text format, "Comments,
// help text, and type information"). That is less than %q does, which a scraper would misread.
var (
	helpEscaper  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	labelEscaper = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

// write writes the family:
//
//	# HELP tasks Tasks that are known.
//	# TYPE tasks gauge
//	tasks{status="pending"} 0
func (f family) write(b *bytes.Buffer) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", f.name, helpEscaper.Replace(f.help), f.name, f.kind)
	f.samples(b)
}

// writeSample writes one line. It has no timestamp: the scraper knows the time.
func writeSample(b *bytes.Buffer, name string, value float64, pairs ...string) {
	b.WriteString(name)
	if len(pairs) > 0 {
		fmt.Fprintf(b, "{%s}", strings.Join(pairs, ","))
	}
	fmt.Fprintf(b, " %s\n", formatFloat(value))
}

func labelPair(name, value string) string { return name + `="` + labelEscaper.Replace(value) + `"` }

// formatFloat writes 1000000, not 1e+06: both are valid, the first is also good to read and to grep.
func formatFloat(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }

// requestBuckets are for calls between backend and gateway: from one inside the process to the limit of 5 s. What is
// above the last bound is a timeout, or has waited for its turn.
func requestBuckets() []float64 {
	return []float64{.0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}
}

// backendMetrics are the backend's families, but for the gauges, which main registers with their owners. A service is
// task or version; any other argument must be one of the values named at the method.
type backendMetrics struct {
	connections, events, dropped, tasks *counterVec
	sendSeconds, taskSeconds            *histogramVec
}

// newBackendMetrics registers the families; taskTypes are the types of task that RecordTask accepts, each once.
func newBackendMetrics(r *registry, taskTypes []string) *backendMetrics {
	service := label{"service", []string{"task", "version", "page"}}
	kind := label{"type", taskTypes}
	taskBuckets := []float64{.1, .5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600}
	return &backendMetrics{
		connections: r.counters("sse_gateway_connections_total", "Connections made, and removed by a disconnect callback.",
			service, label{"action", []string{"connect", "disconnect"}}),
		events: r.counters("sse_gateway_events_sent_total", "Events sent to the gateway, by outcome.",
			service, label{"status", []string{"success", "error"}}),
		sendSeconds: r.histograms("sse_gateway_send_duration_seconds", "Duration of a send to the gateway in seconds.",
			requestBuckets(), service),
		dropped: r.counters("sse_outbox_dropped_total", "Events dropped before delivery, by reason.",
			service, label{"reason", []string{"limit", "expired"}}),
		tasks: r.counters("task_executions_total", "Tasks that ended, by final status.",
			kind, label{"status", []string{"completed", "failed", "cancelled"}}),
		taskSeconds: r.histograms("task_duration_seconds", "Duration of a task that ended in seconds.", taskBuckets, kind),
	}
}

// RecordSSEGatewayConnection counts a connection; action is connect or disconnect.
func (m *backendMetrics) RecordSSEGatewayConnection(service, action string) {
	m.connections.with(service, action).Inc()
}

// RecordSSEGatewayEvent counts an event sent to the gateway; status is success or error.
func (m *backendMetrics) RecordSSEGatewayEvent(service, status string) {
	m.events.with(service, status).Inc()
}

// RecordSSEGatewaySendDuration observes the time that one send took, however it ended.
func (m *backendMetrics) RecordSSEGatewaySendDuration(service string, seconds float64) {
	m.sendSeconds.with(service).observe(seconds)
}

// RecordOutboxDropped counts n undelivered events; reason is limit or expired. Below 1, n counts nothing.
func (m *backendMetrics) RecordOutboxDropped(service, reason string, n int) {
	m.dropped.with(service, reason).Add(uint64(max(n, 0)))
}

// RecordTask counts a task that ended and observes its duration; status is completed, failed or cancelled.
func (m *backendMetrics) RecordTask(kind, status string, seconds float64) {
	m.tasks.with(kind, status).Inc()
	m.taskSeconds.with(kind).observe(seconds)
}

// gatewayMetrics are the gateway's families, but for the gauge of open streams, which main registers with its owner.
type gatewayMetrics struct {
	opened          *counter
	closed          *counterVec   // by reason
	refused         *counterVec   // by reason
	events          *counterVec   // by status
	callbacks       *counterVec   // by action, status
	callbackSeconds *histogramVec // by action
}

func newGatewayMetrics(r *registry) *gatewayMetrics {
	action := label{"action", []string{"connect", "disconnect"}}
	return &gatewayMetrics{
		opened: r.counters("gateway_streams_opened_total", "Streams opened.").with(),
		closed: r.counters("gateway_streams_closed_total", "Streams ended, by reason.",
			label{"reason", []string{"client_closed", "server_closed", "error"}}),
		refused: r.counters("gateway_refused_total", "Requests that got no stream: no room or a shutdown, the backend's "+
			"final answer, its trouble, or the request itself.",
			label{"reason", []string{refusedCapacity, refusedRejected, refusedBackend, refusedRequest}}),
		events: r.counters("gateway_events_total", "Events posted to the gateway, by what became of them.",
			label{"status", []string{"written", "buffered", "unknown_token", "invalid"}}),
		callbacks: r.counters("gateway_callbacks_total", "Callbacks to the backend, by outcome.",
			action, label{"status", []string{"accepted", "rejected", "timeout", "error"}}),
		callbackSeconds: r.histograms("gateway_callback_duration_seconds", "Duration of a callback in seconds.",
			requestBuckets(), action),
	}
}
