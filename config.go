// The environment, read into a documented struct for each role, with every problem reported at once. Nothing else of
// the program is known here.

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

const (
	defaultAddr     = "localhost:8080"
	maxCount        = 1 << 30            // the upper bound of counts that have no other
	maxSeconds      = 365 * 24 * 60 * 60 // a year
	minSecretLength = 16                 // characters, in production
)

// gatewayConfig configures the gateway role. loadBackendConfig leaves Addr and CallbackURL empty: the backend sets
// where callbacks of its embedded gateway go. Here and below, seconds may have decimals and are from 0.001 to a year; a
// count without another upper bound is at most 1<<30.
type gatewayConfig struct {
	// Addr is the public listen address: PORT (default 3000; 0 lets the system choose) at HOST (default "" = on every
	// interface).
	Addr string
	// InternalAddr (INTERNAL_ADDR, default "") serves pprof and /metrics, and with a gateway that runs alone it is the
	// one address that serves /metrics and /internal/send. When empty, its public address does, and nothing serves
	// pprof.
	InternalAddr string
	// CallbackURL (CALLBACK_URL, default "") gets the callbacks; its query may carry their secret, so it is never
	// printed. When empty, readiness and every stream are 503.
	CallbackURL secret
	// Heartbeat (HEARTBEAT_INTERVAL_SECONDS, default 15) is the time between two comments on a stream. A proxy that
	// cuts idle connections sooner than that cuts every quiet stream.
	Heartbeat time.Duration
	// MaxConnections (MAX_CONNECTIONS, default 0 = no limit) is how many streams may be open; one more must come again.
	MaxConnections int
	// StreamBuffer (STREAM_BUFFER_BYTES, default 1 MiB, 1 KiB to 1 GiB) is how many bytes may wait for one client; a
	// single event may be larger. If more would wait, the stream takes nothing more, and ends.
	StreamBuffer int
	// WriteTimeout (WRITE_TIMEOUT_SECONDS, default 10) is for how long a client may take nothing before it is cut. It
	// is looked at four times in that time, so it may be up to half as long again.
	WriteTimeout time.Duration
	// MaxStream (MAX_STREAM_SECONDS, default 0 = no limit) ends each stream after 80 to 100 % of it. Without it,
	// streams that a proxy left half open stay until a write fails.
	MaxStream time.Duration
	// Retry (RETRY_MILLISECONDS, default 2000, 1 to 3600000) is the least time before a browser reconnects. Each stream
	// is told one to two times this, so that browsers do not all come back at once.
	Retry time.Duration
	// CORSAllowOrigin (CORS_ALLOW_ORIGIN, default "") is the origin, in lower case, whose pages may read streams from
	// another site, or "*". When empty, only pages of the same site can read them.
	CORSAllowOrigin string
}

// backendConfig configures the backend role.
type backendConfig struct {
	// Production is true when APP_ENV (default "development") is "production". Then API_TOKEN is required, and
	// SSE_CALLBACK_SECRET too unless the gateway is embedded; either has at least 16 characters. There is no live page.
	Production bool
	// Addr (ADDR, default "localhost:8080") is the public listen address. Other machines cannot reach the default.
	Addr string
	// GatewayURL (SSE_GATEWAY_URL, default "" = embedded) is the base URL of the gateway, here without a trailing
	// slash.
	GatewayURL string
	// DataDir (DATA_DIR, default "" = in memory) is the folder in which tasks, their events and versions outlive the
	// process. It is made if it is missing, and one process at a time has it.
	DataDir string
	// CallbackSecret (SSE_CALLBACK_SECRET, default "") must come with every callback. When empty, an embedded gateway
	// gets a random one; with a separate gateway, anyone who reaches the callback can then register connections.
	CallbackSecret secret
	// APIToken (API_TOKEN, default "") is needed to change tasks or deployments, and in production to list the tasks.
	// When empty, anyone may.
	APIToken secret
	// Tasks and Version are the limits of the services.
	Tasks   taskConfig
	Version versionConfig
	// FrontendVersionURL (FRONTEND_VERSION_URL, default "" = no polling) is a version.json that is polled in full. A
	// version that was seen twice in a row, and is not the current one, is announced to all.
	FrontendVersionURL string
	// FrontendVersionPoll (FRONTEND_VERSION_POLL_SECONDS, default 30) is how often; an announcement is late by up to
	// twice this.
	FrontendVersionPoll time.Duration
	// Sweep (CONNECTION_SWEEP_SECONDS, default 60) is how often connections are checked against the gateway, and so
	// about how long one that the gateway lost is still counted.
	Sweep time.Duration
	// Gateway configures the embedded gateway. With a GatewayURL it is checked, but only its InternalAddr is used.
	Gateway gatewayConfig
}

// taskConfig are the limits of a TaskService.
type taskConfig struct {
	// workers (TASK_MAX_WORKERS, default 4, 1 to 10000) is how many tasks run at once; more wait as pending.
	workers int
	// queueLimit (TASK_QUEUE_LIMIT, default 1000, at least 0) is how many tasks may wait; one more is answered 503.
	queueLimit int
	// timeout (TASK_TIMEOUT_SECONDS, default 300) is how long a task may run, or an external one be silent, before
	// it fails.
	timeout time.Duration
	// remember (TASK_CLEANUP_INTERVAL_SECONDS, default 600) is how long a finished task is remembered; then it is
	// 404.
	remember time.Duration
	// eventLimit (TASK_EVENT_LIMIT, default 1000) is how many events are kept per task. Beyond it the oldest
	// progress goes; the first and the terminal event always stay, hence at least 2.
	eventLimit int
	// memory (TASK_MEMORY_BYTES, default 256 MiB, at least 64 KiB) is what all tasks may hold: events, results and
	// what else they take. Beyond it finished tasks are forgotten, the first to finish first. If none is left, new
	// tasks are answered 503, and a report makes its own task lose its oldest progress. An end is always taken, and the
	// last report kept.
	memory int
}

// versionConfig are the limits of a VersionService.
type versionConfig struct {
	// pendingLimit (VERSION_PENDING_LIMIT, default 100, 0 = unbounded) is how many undelivered events are kept
	// per request_id; beyond it the oldest is dropped and counted. As many delivered ones are kept for browsers that
	// come back.
	pendingLimit int
	// pendingTTL (VERSION_PENDING_SECONDS, default 3600) is how long a log is kept without a connection.
	// Then its events are dropped and counted.
	pendingTTL time.Duration
}

// loadBackendConfig reads the configuration of a backend. Here and below, an empty variable counts as unset. An error
// has a line for each problem; then the other result is of no use.
func loadBackendConfig(getenv func(string) string) (backendConfig, error) {
	r := envReader{getenv: getenv}
	production := r.choice("APP_ENV", "development", "development production") == "production"
	c := backendConfig{
		Production:     production,
		Addr:           r.addr("ADDR", defaultAddr),
		GatewayURL:     r.baseURL("SSE_GATEWAY_URL"),
		DataDir:        getenv("DATA_DIR"),
		CallbackSecret: r.secret("SSE_CALLBACK_SECRET", production, production && getenv("SSE_GATEWAY_URL") != ""),
		APIToken:       r.secret("API_TOKEN", production, production),
		Tasks: taskConfig{
			workers:    r.number("TASK_MAX_WORKERS", 4, 1, 10000),
			queueLimit: r.number("TASK_QUEUE_LIMIT", 1000, 0, maxCount),
			timeout:    r.seconds("TASK_TIMEOUT_SECONDS", "300"),
			remember:   r.seconds("TASK_CLEANUP_INTERVAL_SECONDS", "600"),
			eventLimit: r.number("TASK_EVENT_LIMIT", 1000, 2, maxCount),
			memory:     r.number("TASK_MEMORY_BYTES", 256<<20, 64<<10, math.MaxInt),
		},
		Version: versionConfig{
			pendingLimit: r.number("VERSION_PENDING_LIMIT", 100, 0, maxCount),
			pendingTTL:   r.seconds("VERSION_PENDING_SECONDS", "3600"),
		},
		FrontendVersionURL:  r.url("FRONTEND_VERSION_URL", " #"),
		FrontendVersionPoll: r.seconds("FRONTEND_VERSION_POLL_SECONDS", "30"),
		Sweep:               r.seconds("CONNECTION_SWEEP_SECONDS", "60"),
		Gateway:             r.gateway(),
	}
	return c, errors.Join(r.errs...)
}

// servesHost reports whether requests to that Host are served. In development it must name this machine: a page under a
// name that was made to point here (DNS rebinding) is of the same site to a browser. If every interface is listened on,
// any address will do, as no name can stand for one.
func (c backendConfig) servesHost(hostport string) bool {
	host, own := hostOf(hostport), hostOf(c.Addr)
	ip := net.ParseIP(host)
	anywhere := own == "" || net.ParseIP(own).IsUnspecified()
	return c.Production || host == "localhost" || ip.IsLoopback() || host != "" && host == own || ip != nil && anywhere
}

// hostOf returns the host of host:port, or of a host alone.
func hostOf(hostport string) string {
	if host, _, err := net.SplitHostPort(hostport); err == nil {
		return strings.ToLower(host)
	}
	return strings.ToLower(strings.Trim(hostport, "[]"))
}

// exposed says what everybody on the network may do because a secret is not set.
func (c backendConfig) exposed() string {
	host := hostOf(c.Addr)
	switch {
	case c.Production || host == "localhost" || net.ParseIP(host).IsLoopback():
		return ""
	case c.APIToken == "":
		return "start, report and cancel tasks, and announce versions, as API_TOKEN is not set"
	case c.GatewayURL != "" && c.CallbackSecret == "":
		return "take over streams, as SSE_CALLBACK_SECRET is not set"
	}
	return ""
}

// loadGatewayConfig reads the configuration of a gateway that runs alone.
func loadGatewayConfig(getenv func(string) string) (gatewayConfig, error) {
	r := envReader{getenv: getenv}
	c := r.gateway()
	c.Addr = r.portAddr()
	c.CallbackURL = secret(r.url("CALLBACK_URL", " #"))
	if u := parseURL(string(c.CallbackURL)); u != nil {
		_, err := url.ParseQuery(u.RawQuery) // or its secret could not be read
		r.check("CALLBACK_URL", err == nil, "a URL whose query can be decoded")
	}
	return c, errors.Join(r.errs...)
}

// newLogger returns the logger that LOG_LEVEL (default info) and LOG_FORMAT (default text) ask for.
func newLogger(getenv func(string) string, w io.Writer) (*slog.Logger, error) {
	r := envReader{getenv: getenv}
	var level slog.Level
	level.UnmarshalText([]byte(r.choice("LOG_LEVEL", "info", "debug info warn error")))
	options := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(w, options)
	if r.choice("LOG_FORMAT", "text", "text json") == "json" {
		h = slog.NewJSONHandler(w, options)
	}
	return slog.New(h), errors.Join(r.errs...)
}

// healthcheckURL returns where this machine's readiness is asked: at ADDR, or else at PORT, which only a gateway has,
// or else at the backend's default address.
func healthcheckURL(getenv func(string) string) (string, error) {
	r := envReader{getenv: getenv}
	name, addr := "ADDR", r.addr("ADDR", defaultAddr)
	if getenv("ADDR") == "" && getenv("PORT") != "" {
		name, addr = "PORT", r.portAddr()
	}
	host, port, _ := net.SplitHostPort(addr) // what does not split is already in r.errs
	r.check(name, len(r.errs) > 0 || strings.Trim(port, "0") != "",
		"given a port above 0 for a health check, which cannot know the port that the system chose")
	if host == "" || net.ParseIP(host).IsUnspecified() {
		host = "127.0.0.1" // listening on every address includes this one, also for [::]
	}
	u := url.URL{Scheme: "http", Host: net.JoinHostPort(host, port), Path: "/readyz"}
	return u.String(), errors.Join(r.errs...)
}

// warnOfVariables warns of variables with names like ours that nothing reads: they may be misspelt. It never shows a
// value.
func warnOfVariables(environ []string, log *slog.Logger) {
	known := map[string]bool{}
	note := func(name string) string { known[name] = true; return "" } // for each name that is read
	loadBackendConfig(note)
	loadGatewayConfig(note)
	for _, variable := range environ {
		name, _, _ := strings.Cut(variable, "=")
		if !known[name] && ourVariable.MatchString(name) && !serviceVariable.MatchString(name) {
			log.Warn("no such setting: is its name misspelt?", "variable", name)
		}
	}
}

// ourVariable has no prefix that other programs use as well, such as LOG_. serviceVariable matches what Kubernetes sets
// for each of its services.
var (
	ourVariable = regexp.MustCompile(`^(TASK|SSE|VERSION|FRONTEND|CONNECTION|CALLBACK|HEARTBEAT|INTERNAL|MAX|STREAM|WRITE|RETRY|` +
		`CORS|DATA)_`)
	serviceVariable = regexp.MustCompile(`_(PORT|SERVICE_HOST|SERVICE_PORT)(_|$)`)
)

// envReader reads variables and collects what is wrong with them.
type envReader struct {
	getenv func(string) string
	errs   []error
}

// gateway reads what both roles need of the configuration of a gateway.
func (r *envReader) gateway() gatewayConfig {
	return gatewayConfig{
		InternalAddr:    r.addr("INTERNAL_ADDR", ""),
		Heartbeat:       r.seconds("HEARTBEAT_INTERVAL_SECONDS", "15"),
		MaxConnections:  r.number("MAX_CONNECTIONS", 0, 0, maxCount),
		StreamBuffer:    r.number("STREAM_BUFFER_BYTES", 1<<20, 1<<10, 1<<30),
		WriteTimeout:    r.seconds("WRITE_TIMEOUT_SECONDS", "10"),
		MaxStream:       r.seconds("MAX_STREAM_SECONDS", "0"),
		Retry:           time.Duration(r.number("RETRY_MILLISECONDS", 2000, 1, 3_600_000)) * time.Millisecond,
		CORSAllowOrigin: r.origin("CORS_ALLOW_ORIGIN"),
	}
}

// choice reads one of the words.
func (r *envReader) choice(name, unset, words string) string {
	v := cmp.Or(r.getenv(name), unset)
	r.check(name, slices.Contains(strings.Fields(words), v), "one of "+words)
	return v
}

// number reads a whole number from low to high.
func (r *envReader) number(name string, unset, low, high int) int {
	n, err := strconv.Atoi(cmp.Or(r.getenv(name), strconv.Itoa(unset)))
	r.check(name, err == nil && n >= low && n <= high, fmt.Sprintf("a whole number from %d to %d", low, high))
	return n
}

// seconds reads a time in seconds, which may have decimals. If unset is "0", which means no limit, it may be 0.
func (r *envReader) seconds(name, unset string) time.Duration {
	f, err := strconv.ParseFloat(cmp.Or(r.getenv(name), unset), 64)
	must := fmt.Sprintf("a number of seconds from 0.001 to %d", maxSeconds)
	good := f >= 0.001 && f <= maxSeconds // false for NaN
	if unset == "0" {
		must = "0 or " + must
		good = good || f == 0
	}
	r.check(name, err == nil && good, must)
	return time.Duration(math.Round(f * float64(time.Second)))
}

// addr reads host:port. An empty host means every interface. It replaces localhost by its address, as a container with
// nothing but the binary has no /etc/hosts.
func (r *envReader) addr(name, unset string) string {
	v := cmp.Or(r.getenv(name), unset)
	host, port, err := net.SplitHostPort(v)
	_, portErr := strconv.ParseUint(port, 10, 16)
	r.check(name, v == "" || err == nil && portErr == nil, "host:port with a port from 0 to 65535")
	if host == "localhost" {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return v
}

// portAddr reads HOST and PORT as an address.
func (r *envReader) portAddr() string {
	host := r.getenv("HOST")
	_, err := netip.ParseAddr(host)
	r.check("HOST", err == nil || !strings.ContainsAny(host, ":/[] "), "an IP address or host name, without a port")
	if host == "localhost" {
		host = "127.0.0.1" // see addr
	}
	return net.JoinHostPort(host, strconv.Itoa(r.number("PORT", 3000, 0, 65535)))
}

// url reads an absolute http or https URL without certain characters: a '#' would cut off the rest of a secret.
func (r *envReader) url(name, without string) string {
	v := r.getenv(name)
	u := parseURL(v)
	good := u != nil && (u.Scheme == "http" || u.Scheme == "https") && !strings.ContainsAny(v, without)
	r.check(name, v == "" || good, fmt.Sprintf("an http or https URL with a host, without user info and without any of %q", without))
	return v
}

// baseURL reads a URL to which paths are added, without a path of its own. It returns it without a slash at its end.
func (r *envReader) baseURL(name string) string {
	v := strings.TrimRight(r.url(name, " #?"), "/")
	u := parseURL(v)
	r.check(name, u == nil || u.Path == "", "without a path")
	return v
}

// origin reads an origin as browsers send it, or "*". Several origins, a wildcard within one, or the usual port would
// never match.
func (r *envReader) origin(name string) string {
	v := strings.ToLower(r.getenv(name))
	u := parseURL(v)
	odd := func(c rune) bool { return c <= ' ' || c > '~' || c == '*' || c == ',' }
	usual := strings.HasPrefix(v, "http:") && strings.HasSuffix(v, ":80") || strings.HasPrefix(v, "https:") && strings.HasSuffix(v, ":443")
	good := u != nil && v == u.Scheme+"://"+u.Host && !strings.ContainsFunc(v, odd) && !usual
	r.check(name, v == "" || v == "*" || good, `"*" or one scheme://host[:port] in ASCII without a path, not even "/", and without the usual port`)
	return v
}

// secret reads a value that can be sent in a header. In production it must be long, if it is set.
func (r *envReader) secret(name string, production, required bool) secret {
	v := r.getenv(name)
	plain := strings.TrimSpace(v) == v && !strings.ContainsFunc(v, unicode.IsControl)
	long := len([]rune(v)) >= minSecretLength
	r.check(name, v != "" || !required, "set in production")
	r.check(name, plain, "free of control characters and of space at either end")
	r.check(name, v == "" || !production || long, fmt.Sprintf("at least %d characters long in production", minSecretLength))
	return secret(v)
}

// check notes what a variable must be, unless it is good. It shows the value, unless that is a secret or may have one
// in the user info or the query of a URL.
func (r *envReader) check(name string, good bool, must string) {
	if good {
		return
	}
	v := r.getenv(name)
	isSecret := name == "API_TOKEN" || name == "SSE_CALLBACK_SECRET" || name == "CALLBACK_URL"
	if !isSecret && !strings.ContainsAny(v, "@?") {
		must = fmt.Sprintf("%s, not %q", must, v)
	}
	r.errs = append(r.errs, fmt.Errorf("%s must be %s", name, must))
}

// parseURL returns nil unless v is an absolute URL with a host, with a valid port or none, and without user info. It
// drops the error of url.Parse, which quotes the URL.
func parseURL(v string) *url.URL {
	u, err := url.Parse(v)
	if err != nil || u.Scheme == "" || u.Hostname() == "" || u.User != nil || strings.HasSuffix(u.Host, ":") {
		return nil
	}
	if port, err := strconv.ParseUint(cmp.Or(u.Port(), "80"), 10, 16); err != nil || port == 0 {
		return nil
	}
	return u
}

// secret is a string that is printed, logged and marshaled as "[redacted]", or as "" when it is empty. A conversion to
// string gives it away, and so do the places where its methods are not called: fmt for unexported fields, %p and %w,
// and encoding/json for the keys of a map.
type secret string

func (s secret) String() string {
	if s == "" {
		return ""
	}
	return "[redacted]"
}

// Format covers the verbs that would not ask for String, such as %x.
func (s secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// MarshalText is for logs and JSON.
func (s secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
