package main

import (
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// scrapeAll returns the whole page of r.
func scrapeAll(r *registry) string {
	w := httptest.NewRecorder()
	r.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w.Body.String()
}

// scrapeURL returns the page of the process at a base URL, or "" when it does not answer.
func scrapeURL(client *http.Client, base string) string {
	resp, err := client.Get(base + "/metrics")
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	return string(text)
}

// scrapeFamilies returns the page of r without the families that every registry has.
func scrapeFamilies(r *registry) string {
	text, _, _ := strings.Cut(scrapeAll(r), "# HELP process_start_time_seconds ")
	_, text, _ = strings.Cut(text, `http_requests_total{code="5xx"} 0`+"\n")
	return text
}

// scrapeValue returns the value of one series, which is given as on the page, or NaN when it is not there.
func scrapeValue(text, series string) float64 {
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(text)
	if m == nil {
		return math.NaN()
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return math.NaN()
	}
	return v
}

// bothRoles returns the registry of a backend with an embedded gateway, made as in main: it has every family of the
// program, with the gauges of their owners.
func bothRoles(t testing.TB) (*registry, *backendMetrics, *gatewayMetrics) {
	cfg, err := loadBackendConfig(getenvFrom(nil))
	must(t, err)
	r, log := newRegistry("1.2.3"), slog.New(slog.DiscardHandler)
	b := newBackend(cfg, "http://gateway.invalid", r, log)
	g := newGateway(cfg.Gateway, log, r)
	return r, b.conns.met, g.met
}

// If a family of the contract were not on the page, only a dashboard would notice.
func TestMetricsFamilies(t *testing.T) {
	r, _, _ := bothRoles(t)
	text := scrapeAll(r)
	for family := range strings.FieldsSeq(`sse_gateway_connections_total sse_gateway_active_connections sse_gateway_events_sent_total
		sse_gateway_send_duration_seconds sse_outbox_events sse_outbox_dropped_total task_executions_total task_duration_seconds tasks
		gateway_streams gateway_streams_opened_total gateway_streams_closed_total gateway_events_total gateway_refused_total
		gateway_callbacks_total gateway_callback_duration_seconds http_requests_total process_start_time_seconds
		process_resident_memory_bytes process_open_fds process_max_fds go_goroutines go_memstats_heap_alloc_bytes sidecast_build_info`) {
		if n := strings.Count(text, "# TYPE "+family+" "); n != 1 {
			t.Errorf("%s is there %d times, want once", family, n)
		}
	}
}

func TestMetricsText(t *testing.T) {
	check := func(fill func(r *registry), want ...string) {
		t.Helper()
		r := newRegistry("test")
		fill(r)
		if got, want := scrapeFamilies(r), strings.Join(append(want, ""), "\n"); got != want {
			t.Errorf("got:\n%s\nwant:\n%s", got, want)
		}
	}
	counters := func(do func(v *family), labels ...label) func(*registry) {
		return func(r *registry) { do(r.counters("c_total", "h", labels...)) }
	}
	gauge := func(values map[string]float64, l ...label) func(*registry) {
		return func(r *registry) { r.gauge("g", "h", func() map[string]float64 { return values }, l...) }
	}
	histograms := func(do func(v *family), buckets []float64, labels ...label) func(*registry) {
		return func(r *registry) { do(r.histograms("h", "h", buckets, labels...)) }
	}
	l, m := label{"l", []string{"a", "b"}}, label{"m", []string{"x", "y"}}

	check(func(*registry) {})
	check(func(r *registry) { gauge(nil)(r); r.counters("c_total", "h") }, // in the order of registration
		"# HELP g h", "# TYPE g gauge", "g 0", "# HELP c_total h", "# TYPE c_total counter", "c_total 0")

	// Counters: every series is there from the start, each handle has its own, numbers have no exponent.
	check(counters(func(v *family) {}),
		"# HELP c_total h", "# TYPE c_total counter", "c_total 0")
	check(counters(func(v *family) { v.with().Add(1e6); v.with().Inc() }),
		"# HELP c_total h", "# TYPE c_total counter", "c_total 1000001")
	check(counters(func(v *family) {}, label{"l", nil}),
		"# HELP c_total h", "# TYPE c_total counter")
	check(counters(func(v *family) { v.with("a", "y").Inc(); v.with("b", "x").Add(2) }, l, m),
		"# HELP c_total h", "# TYPE c_total counter",
		`c_total{l="a",m="x"} 0`, `c_total{l="a",m="y"} 1`, `c_total{l="b",m="x"} 2`, `c_total{l="b",m="y"} 0`)

	// Gauges: a value that is not in the map is 0, one that is not of the label is ignored, a zero label is no label.
	check(gauge(nil),
		"# HELP g h", "# TYPE g gauge", "g 0")
	check(gauge(map[string]float64{"": 1e6, "a": 7}),
		"# HELP g h", "# TYPE g gauge", "g 1000000")
	check(gauge(map[string]float64{"b": -1.5, "c": 7}, l),
		"# HELP g h", "# TYPE g gauge", `g{l="a"} 0`, `g{l="b"} -1.5`)
	check(gauge(map[string]float64{"a": math.NaN(), "b": math.Inf(1)}, l),
		"# HELP g h", "# TYPE g gauge", `g{l="a"} NaN`, `g{l="b"} +Inf`)

	// Histograms: a bound belongs to its own bucket, buckets are cumulative, the sum never falls.
	check(histograms(func(v *family) {}, []float64{.5}),
		"# HELP h h", "# TYPE h histogram", `h_bucket{le="0.5"} 0`, `h_bucket{le="+Inf"} 0`, "h_sum 0", "h_count 0")
	check(histograms(func(v *family) {
		for _, seconds := range []float64{.25, .5, 1, 10} {
			v.with().observe(seconds)
		}
	}, []float64{.0001, .5, 2}),
		"# HELP h h", "# TYPE h histogram", `h_bucket{le="0.0001"} 0`, `h_bucket{le="0.5"} 2`, `h_bucket{le="2"} 3`,
		`h_bucket{le="+Inf"} 4`, "h_sum 11.75", "h_count 4")
	check(histograms(func(v *family) { v.with("b").observe(-1); v.with("b").observe(math.NaN()) }, nil, l),
		"# HELP h h", "# TYPE h histogram",
		`h_bucket{l="a",le="+Inf"} 0`, `h_sum{l="a"} 0`, `h_count{l="a"} 0`,
		`h_bucket{l="b",le="+Inf"} 2`, `h_sum{l="b"} 0`, `h_count{l="b"} 2`)

	// Escaping: only what the format escapes; %q would also rewrite the tab.
	raw := "a\\b\nc \"d\" é\t"
	check(func(r *registry) { r.counters("c_total", raw, label{"l", []string{raw}}).with(raw).Inc() },
		`# HELP c_total a\\b\nc "d" é`+"\t", "# TYPE c_total counter", `c_total{l="a\\b\nc \"d\" é`+"\t"+`"} 1`)
	check(gauge(map[string]float64{`"`: 1}, label{"l", []string{`"`}}),
		"# HELP g h", "# TYPE g gauge", `g{l="\""} 1`)
}

func TestMetricsRoles(t *testing.T) {
	r, backend, gateway := bothRoles(t)
	backend.connections.with("task", "connect").Inc()
	backend.events.with("version", "error").Inc()
	backend.sendSeconds.with("task").observe(6)
	backend.dropped.with("version", "limit").Add(3)
	backend.dropped.with("version", "expired").Add(-1) // as an uint64 it would be nearly 2⁶⁴
	backend.tasks.with("demo", "cancelled").Inc()
	backend.taskSeconds.with("demo").observe(2)
	gateway.opened.Inc()
	gateway.closed.with("client_closed").Inc()
	gateway.refused.with("capacity").Inc()
	r.requests.with("401").Add(2)
	gateway.events.with("unknown_token").Inc()
	gateway.callbacks.with("disconnect", "timeout").Inc()
	gateway.callbackSeconds.with("connect").observe(.002)

	wantSeries(t, scrapeAll(r), map[string]float64{
		`sse_gateway_connections_total{service="task",action="connect"}`:         1,
		`sse_gateway_connections_total{service="version",action="disconnect"}`:   0,
		`sse_gateway_events_sent_total{service="version",status="error"}`:        1,
		`sse_gateway_send_duration_seconds_bucket{service="task",le="5"}`:        0,
		`sse_gateway_send_duration_seconds_bucket{service="task",le="+Inf"}`:     1,
		`sse_outbox_dropped_total{service="version",reason="limit"}`:             3,
		`sse_outbox_dropped_total{service="version",reason="expired"}`:           0,
		`task_executions_total{type="demo",status="cancelled"}`:                  1,
		`task_duration_seconds_sum{type="demo"}`:                                 2,
		`task_duration_seconds_count{type="external"}`:                           0,
		`gateway_streams_opened_total`:                                           1,
		`gateway_streams_closed_total{reason="client_closed"}`:                   1,
		`gateway_refused_total{reason="capacity"}`:                               1,
		`gateway_refused_total{reason="rejected"}`:                               0,
		`http_requests_total{code="401"}`:                                        2,
		`http_requests_total{code="4xx"}`:                                        0,
		`gateway_events_total{status="unknown_token"}`:                           1,
		`gateway_callbacks_total{action="disconnect",status="timeout"}`:          1,
		`gateway_callback_duration_seconds_bucket{action="connect",le="0.0025"}`: 1,
	})
}

// A value outside of the closed set must not make a series.
func TestMetricsClosedSets(t *testing.T) {
	panics := func(what string, f func()) {
		t.Helper()
		defer func() {
			t.Helper()
			if recover() == nil {
				t.Errorf("%s: no panic", what)
			}
		}()
		f()
	}
	r, backend, gateway := bothRoles(t)
	before := scrapeFamilies(r)
	panics("unknown value", func() { gateway.closed.with("other") })
	panics("empty value", func() { gateway.closed.with("") })
	panics("values in the wrong order", func() { gateway.callbacks.with("accepted", "connect") })
	panics("too few values", func() { gateway.callbacks.with("connect") })
	panics("too many values", func() { gateway.closed.with("error", "error") })
	panics("unknown type of task", func() { backend.tasks.with("other", "failed") })
	panics("histogram", func() { gateway.callbackSeconds.with("other") })
	panics("name taken", func() { newGatewayMetrics(r) })
	if got := scrapeFamilies(r); got != before {
		t.Errorf("got:\n%s\nwant as before:\n%s", got, before)
	}
}

// Counting happens once per event and stream, so it must leave nothing for the garbage collector.
func TestMetricsAllocations(t *testing.T) {
	_, backend, _ := bothRoles(t)
	if n := testing.AllocsPerRun(100, func() {
		backend.events.with("task", "success").Inc()
		backend.sendSeconds.with("task").observe(.01)
	}); n != 0 {
		t.Errorf("got %v allocations, want 0", n)
	}
}

// Each scrape under load must be consistent in itself, and the last one complete.
func TestMetricsConcurrent(t *testing.T) {
	const writers, rounds = 4, 500
	r := newRegistry("test")
	c := r.counters("c_total", "h", label{"l", []string{"a", "b"}})
	h := r.histograms("h", "h", []float64{1, 2}).with()
	// An owner may count while it is read: the registry holds no lock then.
	r.gauge("g", "h", func() map[string]float64 {
		c.with("b").Inc()
		return nil
	})

	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for i := range rounds {
				c.with("a").Inc()
				h.observe(float64(1 + i%3))
			}
		})
		wg.Go(func() {
			for range rounds / 10 {
				text := scrapeFamilies(r)
				one, two := scrapeValue(text, `h_bucket{le="1"}`), scrapeValue(text, `h_bucket{le="2"}`)
				inf, count := scrapeValue(text, `h_bucket{le="+Inf"}`), scrapeValue(text, "h_count")
				sum := one + 2*(two-one) + 3*(inf-two)
				if one > two || two > inf || inf != count || scrapeValue(text, "h_sum") != sum {
					t.Errorf("inconsistent histogram:\n%s", text)
				}
			}
		})
	}
	wg.Wait()
	wantSeries(t, scrapeFamilies(r), map[string]float64{`c_total{l="a"}`: writers * rounds, "h_count": writers * rounds})
}

func TestMetricsProcess(t *testing.T) {
	start := float64(time.Now().Add(-time.Second).Unix())
	r := newRegistry(`v"1`)
	text := scrapeAll(r)
	if got := scrapeValue(text, "process_start_time_seconds"); !(got >= start && got <= start+60) {
		t.Errorf("start: got %v, want about %v", got, start)
	}
	for _, name := range []string{"process_max_fds", "go_goroutines", "go_memstats_heap_alloc_bytes"} {
		if got := scrapeValue(text, name); !(got >= 1) {
			t.Errorf("%s: got %v, want at least 1", name, got)
		}
	}
	wantSeries(t, scrapeAll(r), map[string]float64{
		`sidecast_build_info{version="v\"1",goversion="` + runtime.Version() + `"}`: 1,
		"process_start_time_seconds": scrapeValue(text, "process_start_time_seconds"), // as before
	})
	w := httptest.NewRecorder()
	r.ServeHTTP(w, nil)
	if got, want := w.Header().Get("Content-Type"), "text/plain; version=0.0.4; charset=utf-8"; got != want {
		t.Errorf("Content-Type: got %q, want %q", got, want)
	}
}

// What /proc does not have is left out, and the rest of the page stays: an empty chroot has no /proc at all.
func TestMetricsProcFiles(t *testing.T) {
	for _, test := range []struct {
		name, statm string
		fds         int // -1: no directory
		want        string
	}{
		{"no files", "", -1, ""},
		{"all", "900 7 3 1 0 5 0\n", 4, fmt.Sprintln("process_resident_memory_bytes", 7*os.Getpagesize()) + "process_open_fds 3\n"},
		{"short statm", "900\n", 1, "process_open_fds 0\n"},
		{"odd statm", "x y\n", -1, ""},
	} {
		r := newRegistry("test")
		r.proc = t.TempDir()
		write := func(path, text string) {
			path = filepath.Join(r.proc, "self", path)
			must(t, os.MkdirAll(filepath.Dir(path), 0o700))
			writeFile(t, path, text)
		}
		if test.statm != "" {
			write("statm", test.statm)
		}
		for i := range test.fds {
			write("fd/"+strconv.Itoa(i), "")
		}
		text, got := scrapeAll(r), ""
		heads := regexp.MustCompile(`# TYPE process_(?:resident_memory_bytes|open_fds) gauge\n(.*\n)`)
		for _, m := range heads.FindAllStringSubmatch(text, -1) {
			got += m[1]
		}
		if got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
		if !strings.Contains(text, "\nsidecast_build_info{") {
			t.Errorf("%s: the page is cut:\n%s", test.name, text)
		}
	}
}

func TestMetricsProcLinux(t *testing.T) {
	if _, err := os.Stat("/proc/self/statm"); err != nil {
		t.Skip("no /proc here")
	}
	r := newRegistry("test")
	before := scrapeAll(r)
	const files = 100
	for range files {
		f, err := os.Open(os.DevNull)
		must(t, err)
		defer f.Close()
	}
	after := scrapeAll(r)
	more := scrapeValue(after, "process_open_fds") - scrapeValue(before, "process_open_fds")
	if more < files*9/10 || more > files*11/10 { // an earlier test may be about to close some
		t.Errorf("process_open_fds with %d more files: got %v more", files, more)
	}
	if got := scrapeValue(after, "process_resident_memory_bytes"); !(got > 1<<20) {
		t.Errorf("process_resident_memory_bytes: got %v, want more than 1 MiB", got)
	}
}
