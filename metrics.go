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
	families []*family
	requests *family // HTTP requests, by code
	build    string  // labels of sidecast_build_info
	start    float64 // Unix time in seconds
	proc     string  // where Linux shows the process; may not exist
}

// A family is one metric: a counter or a histogram with a series for each combination of its labels' values, the last
// label's changing fastest, or a gauge that is read at each scrape.
type family struct {
	name, help, kind string
	labels           []label
	series           []series
	read             func() map[string]float64 // of a gauge: its values, by that of the label
}

// A label is a name and every value that it may ever have, each once. All series exist at 0 from the start, because
// rate() and increase() do not see the step from absent to 1; no input can ever add one.
type label struct {
	name   string
	values []string
}

// A series is one counter or histogram. Counting allocates nothing.
type series struct {
	labels string        // as in the text: service="task",action="connect"
	value  string        // of the last label
	n      atomic.Uint64 // of a counter, which only grows, from 0 at the start of the process

	bounds []float64  // of a histogram: the buckets' upper bounds in seconds, the last is +Inf; never written
	mu     sync.Mutex // guards counts and sum, which always tell of the same observations
	counts []uint64   // by bucket, not yet cumulative
	sum    float64    // seconds
}

// newRegistry returns a registry without families but those of servers and the process, whose start is the time of this
// call: milliseconds late, but the same on every system and at every scrape. Calculated from /proc (boot time plus
// start ticks) it would be no finer than a second, move with each correction of the clock, and need /proc.
func newRegistry(version string) *registry {
	r := &registry{
		build: labelPair("version", version) + "," + labelPair("goversion", runtime.Version()),
		start: float64(time.Now().UnixMilli()) / 1000,
		proc:  "/proc",
	}
	r.requests = r.counters("http_requests_total", "Requests answered, but for streams and events, by status; 401 is not in 4xx.",
		label{"code", []string{"2xx", "3xx", "4xx", "401", "5xx"}})
	return r
}

// counters registers a counter for each combination of the labels' values; without labels there is one.
func (r *registry) counters(name, help string, labels ...label) *family {
	return r.add("counter", name, help, labels)
}

// histograms registers a histogram for each combination of the labels' values. The buckets are upper bounds in seconds,
// strictly ascending and finite; the one for +Inf is added.
func (r *registry) histograms(name, help string, buckets []float64, labels ...label) *family {
	f := r.add("histogram", name, help, labels)
	bounds := append(slices.Clone(buckets), math.Inf(1))
	for i := range f.series {
		f.series[i].bounds, f.series[i].counts = bounds, make([]uint64, len(bounds))
	}
	return f
}

// gauge registers a gauge whose values, by label value, are read at each scrape. The registry holds no lock then, so
// read may take its own; it must be safe for concurrent use. A label value that is not in the map is 0, a key that is
// not a label value is ignored.
func (r *registry) gauge(name, help string, read func() map[string]float64, labels ...label) {
	r.add("gauge", name, help, labels).read = read
}

// value registers a gauge without a label.
func (r *registry) value(name, help string, read func() float64) {
	r.gauge(name, help, func() map[string]float64 { return map[string]float64{"": read()} })
}

// add appends a family. It panics on a name that is taken, since a scraper would refuse the whole page.
func (r *registry) add(kind, name, help string, labels []label) *family {
	if slices.ContainsFunc(r.families, func(other *family) bool { return other.name == name }) {
		panic("metrics: " + name + " is registered twice")
	}
	f := &family{name: name, help: help, kind: kind, labels: labels, series: make([]series, 1)}
	for _, l := range labels {
		var longer []series
		for i := range f.series {
			for _, value := range l.values {
				pairs := strings.TrimPrefix(f.series[i].labels+","+labelPair(l.name, value), ",")
				longer = append(longer, series{labels: pairs, value: value})
			}
		}
		f.series = longer
	}
	r.families = append(r.families, f)
	return f
}

// with returns the series for one value of each label, in the order of registration, without allocating. A value
// outside of the closed set, or a wrong number of values, is a programming error: it panics.
func (f *family) with(values ...string) *series {
	if len(values) != len(f.labels) {
		panic("metrics: " + f.name + ": wrong number of label values")
	}
	i := 0
	for k, l := range f.labels {
		n := slices.Index(l.values, values[k])
		if n < 0 {
			panic("metrics: " + f.name + ": no " + l.name + " " + strconv.Quote(values[k]))
		}
		i = i*len(l.values) + n
	}
	return &f.series[i]
}

func (s *series) Inc()         { s.n.Add(1) }
func (s *series) Add(n int)    { s.n.Add(uint64(max(n, 0))) }
func (s *series) Load() uint64 { return s.n.Load() }

// observe counts one duration, in the first bucket whose bound is not below it. What is negative or not a number counts
// as 0: the sum is a counter too, and must not fall.
func (s *series) observe(seconds float64) {
	if !(seconds > 0) {
		seconds = 0
	}
	bucket, _ := slices.BinarySearch(s.bounds, seconds)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[bucket]++
	s.sum += seconds
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

// write writes the family:
//
//	# HELP tasks Tasks that are known.
//	# TYPE tasks gauge
//	tasks{status="pending"} 0
func (f *family) write(b *bytes.Buffer) {
	writeHead(b, f.kind, f.name, f.help)
	var current map[string]float64
	if f.read != nil {
		current = f.read()
	}
	for i := range f.series {
		s := &f.series[i]
		switch {
		case s.bounds != nil:
			s.writeHistogram(b, f.name)
		case f.read != nil:
			writeSample(b, f.name, s.labels, current[s.value])
		default:
			writeSample(b, f.name, s.labels, float64(s.n.Load()))
		}
	}
}

// writeHistogram writes one moment of a histogram: cumulative buckets up to le="+Inf", which equals _count, between
// them _sum (Prometheus text format, "Histograms and summaries").
func (s *series) writeHistogram(b *bytes.Buffer, name string) {
	s.mu.Lock()
	counts, sum := slices.Clone(s.counts), s.sum
	s.mu.Unlock()

	var total uint64
	for i, n := range counts {
		total += n
		le := labelPair("le", formatFloat(s.bounds[i]))
		writeSample(b, name+"_bucket", strings.TrimPrefix(s.labels+","+le, ","), float64(total))
	}
	writeSample(b, name+"_sum", s.labels, sum)
	writeSample(b, name+"_count", s.labels, float64(total))
}

// writeProcess writes the families of the process. One that cannot be read is left out: in a chroot there is no /proc,
// and a process out of file descriptors cannot open it.
func (r *registry) writeProcess(b *bytes.Buffer) {
	gauge := func(name, help string, value float64, labels string) {
		writeHead(b, "gauge", name, help)
		writeSample(b, name, labels, value)
	}
	gauge("process_start_time_seconds", "Start of the process since the Unix epoch in seconds.", r.start, "")
	statm, _ := os.ReadFile(r.proc + "/self/statm") // proc(5): total and resident size in pages, and more
	var size, resident float64
	if _, err := fmt.Sscan(string(statm), &size, &resident); err == nil {
		gauge("process_resident_memory_bytes", "Resident memory in bytes.", resident*float64(os.Getpagesize()), "")
	}
	if dir, err := os.Open(r.proc + "/self/fd"); err == nil {
		if names, err := dir.Readdirnames(-1); err == nil {
			gauge("process_open_fds", "Open file descriptors.", float64(len(names)-1), "") // less dir itself
		}
		dir.Close()
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err == nil {
		gauge("process_max_fds", "Limit of open file descriptors.", float64(limit.Cur), "")
	}
	// Unlike runtime.ReadMemStats, this does not stop the world.
	live := []runtimemetrics.Sample{{Name: "/sched/goroutines:goroutines"}, {Name: "/memory/classes/heap/objects:bytes"}}
	runtimemetrics.Read(live)
	gauge("go_goroutines", "Goroutines that exist.", float64(live[0].Value.Uint64()), "")
	gauge("go_memstats_heap_alloc_bytes", "Heap memory in use by objects in bytes.", float64(live[1].Value.Uint64()), "")
	gauge("sidecast_build_info", "Always 1; the labels tell the build.", 1, r.build)
}

// In HELP only backslash and newline are escaped, in a label value also the quote (Prometheus text format, "Comments,
// help text, and type information"). That is less than %q does, which a scraper would misread.
var (
	helpEscaper  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	labelEscaper = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

func writeHead(b *bytes.Buffer, kind, name, help string) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", name, helpEscaper.Replace(help), name, kind)
}

// writeSample writes one line. It has no timestamp: the scraper knows the time.
func writeSample(b *bytes.Buffer, name, labels string, value float64) {
	if labels != "" {
		labels = "{" + labels + "}"
	}
	fmt.Fprintf(b, "%s%s %s\n", name, labels, formatFloat(value))
}

func labelPair(name, value string) string { return name + `="` + labelEscaper.Replace(value) + `"` }

// formatFloat writes 1000000, not 1e+06: both are valid, the first is also good to read and to grep.
func formatFloat(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }

// requestBuckets are for calls between backend and gateway: from one inside the process to the limit of 5 s. What is
// above the last bound is a timeout, or has waited for its turn.
var requestBuckets = []float64{.0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}

// backendMetrics are the backend's families, but for gauges, which those register who know their values.
type backendMetrics struct {
	connections *family // by service, action
	events      *family // by service, status
	sendSeconds *family // by service
	dropped     *family // by service, reason
	tasks       *family // by type, status
	taskSeconds *family // by type
}

func newBackendMetrics(r *registry, taskTypes []string) *backendMetrics {
	service := label{"service", []string{serviceTask, serviceVersion, servicePage}}
	kind := label{"type", taskTypes}
	taskBuckets := []float64{.1, .5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600}
	return &backendMetrics{
		connections: r.counters("sse_gateway_connections_total", "Connections made, and removed by a disconnect callback.",
			service, label{"action", []string{"connect", "disconnect"}}),
		events: r.counters("sse_gateway_events_sent_total", "Events sent to the gateway, by outcome.",
			service, label{"status", []string{"success", "error"}}),
		sendSeconds: r.histograms("sse_gateway_send_duration_seconds", "Duration of a send to the gateway in seconds.",
			requestBuckets, service),
		dropped: r.counters("sse_outbox_dropped_total", "Events dropped before delivery, by reason.",
			service, label{"reason", []string{"limit", "expired"}}),
		tasks: r.counters("task_executions_total", "Tasks that ended, by final status.",
			kind, label{"status", []string{"completed", "failed", "cancelled"}}),
		taskSeconds: r.histograms("task_duration_seconds", "Duration of a task that ended in seconds.", taskBuckets, kind),
	}
}

// Why a request got no stream, in metrics.
const (
	refusedCapacity = "capacity" // MAX_CONNECTIONS or a shutdown
	refusedRejected = "rejected" // the backend's final answer
	refusedBackend  = "backend"  // it is not there, slow or in trouble, or CALLBACK_URL is not set
	refusedRequest  = "request"
)

// gatewayMetrics are the gateway's families, but for its gauge.
type gatewayMetrics struct {
	opened          *series
	closed          *family // by reason
	refused         *family // by reason
	events          *family // by status
	callbacks       *family // by action, status
	callbackSeconds *family // by action
}

func newGatewayMetrics(r *registry) *gatewayMetrics {
	action := label{"action", []string{"connect", "disconnect"}}
	return &gatewayMetrics{
		opened: r.counters("gateway_streams_opened_total", "Streams opened.").with(),
		closed: r.counters("gateway_streams_closed_total", "Streams ended, by reason.",
			label{"reason", []string{clientClosed, serverClosed, streamError}}),
		refused: r.counters("gateway_refused_total", "Requests that got no stream: no room or a shutdown, the backend's "+
			"final answer, its trouble, or the request itself.",
			label{"reason", []string{refusedCapacity, refusedRejected, refusedBackend, refusedRequest}}),
		events: r.counters("gateway_events_total", "Events posted to the gateway, by what became of them.",
			label{"status", []string{"written", "buffered", "unknown_token", "invalid"}}),
		callbacks: r.counters("gateway_callbacks_total", "Callbacks to the backend, by outcome.",
			action, label{"status", []string{"accepted", "rejected", "timeout", "error"}}),
		callbackSeconds: r.histograms("gateway_callback_duration_seconds", "Duration of a callback in seconds.",
			requestBuckets, action),
	}
}
