package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// getenvFrom returns os.Getenv for an environment of just these variables.
func getenvFrom(env map[string]string) func(string) string {
	return func(name string) string { return env[name] }
}

// configProblems returns what both roles and the logger say about an environment, one problem a line.
func configProblems(env map[string]string) string {
	_, backend := loadBackendConfig(getenvFrom(env))
	_, gateway := loadGatewayConfig(getenvFrom(env))
	_, logger := newLogger(getenvFrom(env), io.Discard)
	if err := errors.Join(backend, gateway, logger); err != nil {
		return err.Error()
	}
	return ""
}

func TestConfigDefaults(t *testing.T) {
	wantGateway := gatewayConfig{
		Heartbeat:    15 * time.Second,
		StreamBuffer: 1048576,
		WriteTimeout: 10 * time.Second,
		Retry:        2 * time.Second,
	}
	wantBackend := backendConfig{
		Addr:                "127.0.0.1:8080",
		Tasks:               taskConfig{workers: 4, queueLimit: 1000, timeout: 5 * time.Minute, remember: 10 * time.Minute, eventLimit: 1000, memory: 256 << 20},
		Version:             versionConfig{pendingLimit: 100, pendingTTL: time.Hour},
		FrontendVersionPoll: 30 * time.Second,
		Sweep:               time.Minute,
		Gateway:             wantGateway,
	}
	wantGateway.Addr = ":3000"
	checkConfig(t, nil, wantBackend, wantGateway)
}

func checkConfig(t *testing.T, env map[string]string, wantBackend backendConfig, wantGateway gatewayConfig) {
	t.Helper()
	if got, err := loadBackendConfig(getenvFrom(env)); err != nil || got != wantBackend {
		t.Errorf("backend: got %+v, %v\nwant %+v", got, err, wantBackend)
	}
	if got, err := loadGatewayConfig(getenvFrom(env)); err != nil || got != wantGateway {
		t.Errorf("gateway: got %+v, %v\nwant %+v", got, err, wantGateway)
	}
}

// Every variable has a value of its own here, so one that lands in the wrong field is noticed.
func TestConfigEveryVariable(t *testing.T) {
	env := map[string]string{
		"APP_ENV": "production", "ADDR": ":1", "SSE_GATEWAY_URL": "http://localhost:3000/",
		"SSE_CALLBACK_SECRET": "callback-secret-2", "API_TOKEN": "the-api-token-is-3",
		"TASK_MAX_WORKERS": "4", "TASK_QUEUE_LIMIT": "5", "TASK_TIMEOUT_SECONDS": "6",
		"TASK_CLEANUP_INTERVAL_SECONDS": "7", "TASK_EVENT_LIMIT": "8", "TASK_MEMORY_BYTES": "88888", "VERSION_PENDING_LIMIT": "9",
		"VERSION_PENDING_SECONDS": "10", "FRONTEND_VERSION_URL": "https://example.com/version.json",
		"FRONTEND_VERSION_POLL_SECONDS": "11", "CONNECTION_SWEEP_SECONDS": "0.5",
		"PORT": "12", "HOST": "192.0.2.1", "INTERNAL_ADDR": "[::1]:13", "CALLBACK_URL": "http://localhost/cb?secret=14",
		"HEARTBEAT_INTERVAL_SECONDS": "15", "MAX_CONNECTIONS": "16", "STREAM_BUFFER_BYTES": "1717",
		"WRITE_TIMEOUT_SECONDS": "18", "MAX_STREAM_SECONDS": "19", "RETRY_MILLISECONDS": "20",
		"CORS_ALLOW_ORIGIN": "https://Example.com:8443",
	}
	wantGateway := gatewayConfig{
		InternalAddr:    "[::1]:13",
		Heartbeat:       15 * time.Second,
		MaxConnections:  16,
		StreamBuffer:    1717,
		WriteTimeout:    18 * time.Second,
		MaxStream:       19 * time.Second,
		Retry:           20 * time.Millisecond,
		CORSAllowOrigin: "https://example.com:8443",
	}
	wantBackend := backendConfig{
		Production:          true,
		Addr:                ":1",
		GatewayURL:          "http://localhost:3000",
		CallbackSecret:      "callback-secret-2",
		APIToken:            "the-api-token-is-3",
		Tasks:               taskConfig{workers: 4, queueLimit: 5, timeout: 6 * time.Second, remember: 7 * time.Second, eventLimit: 8, memory: 88888},
		Version:             versionConfig{pendingLimit: 9, pendingTTL: 10 * time.Second},
		FrontendVersionURL:  "https://example.com/version.json",
		FrontendVersionPoll: 11 * time.Second,
		Sweep:               500 * time.Millisecond,
		Gateway:             wantGateway,
	}
	wantGateway.Addr = "192.0.2.1:12"
	wantGateway.CallbackURL = "http://localhost/cb?secret=14"
	checkConfig(t, env, wantBackend, wantGateway)
}

func TestConfigReportsEveryProblemAtOnce(t *testing.T) {
	env := map[string]string{
		"APP_ENV": "staging", "ADDR": "8080", "SSE_GATEWAY_URL": "ftp://gateway",
		"SSE_CALLBACK_SECRET": "a\nb", "API_TOKEN": " c", "TASK_MAX_WORKERS": "0", "TASK_QUEUE_LIMIT": "-1",
		"TASK_TIMEOUT_SECONDS": "5m", "TASK_CLEANUP_INTERVAL_SECONDS": "0", "TASK_EVENT_LIMIT": "1",
		"TASK_MEMORY_BYTES":     "65535",
		"VERSION_PENDING_LIMIT": "many", "VERSION_PENDING_SECONDS": "NaN", "FRONTEND_VERSION_URL": "/version.json",
		"FRONTEND_VERSION_POLL_SECONDS": "+Inf", "CONNECTION_SWEEP_SECONDS": "-1",
		"PORT": "http", "HOST": "localhost:80", "INTERNAL_ADDR": "localhost", "CALLBACK_URL": "hush",
		"HEARTBEAT_INTERVAL_SECONDS": "1e9", "MAX_CONNECTIONS": "1.5", "STREAM_BUFFER_BYTES": "64k",
		"WRITE_TIMEOUT_SECONDS": "10 ", "MAX_STREAM_SECONDS": "never", "RETRY_MILLISECONDS": "2s",
		"CORS_ALLOW_ORIGIN": "https://example.com/", "LOG_LEVEL": "\nINFO", "LOG_FORMAT": "xml",
	}
	lines := map[string]int{}
	for line := range strings.Lines(configProblems(env)) {
		name, rest, _ := strings.Cut(line, " must be ")
		lines[name]++
		hidden := name == "SSE_CALLBACK_SECRET" || name == "API_TOKEN" || name == "CALLBACK_URL"
		if value := fmt.Sprintf("%q", env[name]); strings.HasSuffix(strings.TrimSpace(rest), "not "+value) == hidden {
			t.Errorf("%q: shows the value: %t", line, !hidden)
		}
	}
	// Both roles have a gateway, and configProblems joins what they say.
	want := map[string]int{
		"HEARTBEAT_INTERVAL_SECONDS": 2, "MAX_CONNECTIONS": 2, "STREAM_BUFFER_BYTES": 2, "WRITE_TIMEOUT_SECONDS": 2,
		"MAX_STREAM_SECONDS": 2, "RETRY_MILLISECONDS": 2, "CORS_ALLOW_ORIGIN": 2, "INTERNAL_ADDR": 2,
	}
	for name := range env {
		want[name] = max(want[name], 1)
	}
	if !maps.Equal(lines, want) {
		t.Errorf("got lines %v\nwant %v", lines, want)
	}
}

func TestConfigBounds(t *testing.T) {
	tests := []struct{ name, good, bad string }{
		{"APP_ENV", "development", "Production|prod|development production"},
		{"ADDR", ":0|:65535|0.0.0.0:80|[::1]:80|example.com:80", ":|:65536|:-1|:+1|:http|::1:80|localhost"},
		{"INTERNAL_ADDR", "127.0.0.1:9090", "9090|127.0.0.1"},
		{"HOST", "127.0.0.1|::1|::|fe80::1%eth0|localhost|gateway.internal", "[::1]|127.0.0.1:80|http://h|:|a b"},
		{"PORT", "0|65535", "-1|65536|80.0|:80| 80"},
		{"SSE_GATEWAY_URL", "http://h|HTTPS://h:65535/|http://[::1]:3000",
			"http://h/base|http://h//x|h:3000|http:h|http:///x|http://:80|http://h:|http://h:0|http://h:65536|http://h?|http://h/#|http://u@h|" +
				"http://h/ x"},
		{"FRONTEND_VERSION_URL", "http://h/version.json?v=1", "version.json|http://h/#x|file:///version.json"},
		{"CALLBACK_URL", "http://h/cb?secret=a%23b", "http://h/cb?secret=a#b|http://h/cb?secret=%z|http://h/cb?secret=a;b|http://u:p@h/cb|http://h/\x00"},
		{"SSE_CALLBACK_SECRET", "a b|ü", " a|a |\ta|a\nb|a\x7fb|a\u0085b| "},
		{"API_TOKEN", "short", "a\r\nb|a\u00a0"},
		{"TASK_MAX_WORKERS", "1|10000", "0|10001"},
		{"TASK_QUEUE_LIMIT", "0|1073741824", "-1|1073741825|99999999999999999999"},
		{"TASK_EVENT_LIMIT", "2", "1"},
		{"VERSION_PENDING_LIMIT", "0", "-1"},
		{"MAX_CONNECTIONS", "0", "-1|1e3"},
		{"STREAM_BUFFER_BYTES", "1024|1073741824", "1023|1073741825"},
		{"RETRY_MILLISECONDS", "1|3600000", "0|3600001"},
		{"TASK_TIMEOUT_SECONDS", "0.5|.5|31536000|0.001", "0|-0|0.0|0.0009|1e-12|-1|31536000.5|1s|1e999|-Inf|Inf|NaN|1,5"},
		{"MAX_STREAM_SECONDS", "0|0.0|0.5", "-1|1e-12|31536001|NaN"},
		{"CORS_ALLOW_ORIGIN", "*|https://h|http://h:8080|https://h:80|HTTPS://H|http://[::80]|x://h:80",
			"h|null|https://h/|https://h?|https://h#|https://*.h|https://a,https://b|https://a,b|https://a b|https://ü|" +
				"https://u@h|https://h:|https://h:x|https://h:443|http://h:80|http://[::1]:80|https://h\r\nX: y|https://h\u0085|**"},
		{"LOG_LEVEL", "debug|info|warn|error", "INFO|info+1|warning"},
		{"LOG_FORMAT", "text|json", "JSON|logfmt"},
	}
	for _, test := range tests {
		for value := range strings.SplitSeq("|"+test.good, "|") { // "" is good everywhere
			if got := configProblems(map[string]string{test.name: value}); got != "" {
				t.Errorf("%s=%q: got %s", test.name, value, got)
			}
		}
		for value := range strings.SplitSeq(test.bad, "|") {
			if got := configProblems(map[string]string{test.name: value}); !strings.HasPrefix(got, test.name+" must be ") {
				t.Errorf("%s=%q: got %q", test.name, value, got)
			}
		}
	}
}

func TestConfigProduction(t *testing.T) {
	const long, short = "sixteen-letters!", "fifteen-letters"
	for settings, want := range map[string]string{
		"API_TOKEN=" + long: "",
		"API_TOKEN=" + long + " SSE_GATEWAY_URL=http://h SSE_CALLBACK_SECRET=" + long: "",
		"": "API_TOKEN must be set in production",
		"API_TOKEN=" + long + " SSE_GATEWAY_URL=http://h":     "SSE_CALLBACK_SECRET must be set in production",
		"API_TOKEN=" + short:                                  "API_TOKEN must be at least 16 characters long in production",
		"API_TOKEN=" + long + " SSE_CALLBACK_SECRET=" + short: "SSE_CALLBACK_SECRET must be at least 16 characters long in production",
		"API_TOKEN=" + strings.Repeat("ü", 15):                "API_TOKEN must be at least 16 characters long in production",
	} {
		if got := configProblems(settingsEnv("APP_ENV=production " + settings)); got != want {
			t.Errorf("%s: got %q, want %q", settings, got, want)
		}
	}
}

// A callback URL in the wrong variable must not put its secret into the log of a failed start.
func TestConfigErrorsHideSecrets(t *testing.T) {
	env := map[string]string{"APP_ENV": "production"}
	for _, name := range []string{"SSE_CALLBACK_SECRET", "API_TOKEN", "CALLBACK_URL"} {
		env[name] = "hunter2\x00"
	}
	for _, name := range []string{"ADDR", "INTERNAL_ADDR", "SSE_GATEWAY_URL", "CORS_ALLOW_ORIGIN"} {
		env[name] = "http://h/callback?secret=hunter2"
	}
	env["FRONTEND_VERSION_URL"] = "http://user:hunter2@h:port"
	got := configProblems(env)
	if strings.Contains(got, "hunter2") {
		t.Errorf("got %s", got)
	}
	delete(env, "APP_ENV")
	for name := range env {
		if !strings.Contains(got, name+" must be ") {
			t.Errorf("got %s\nwant %s in it", got, name)
		}
	}
}

func TestSecretShowsNothing(t *testing.T) {
	type holder struct{ Set, Unset secret }
	h := holder{Set: "hunter2"}
	var text, structured bytes.Buffer
	slog.New(slog.NewTextHandler(&text, nil)).Info("m", "secret", h.Set, "holder", h)
	slog.New(slog.NewJSONHandler(&structured, nil)).Info("m", "secret", h.Set, "holder", h)
	marshaled, err := json.Marshal(h)
	must(t, err)
	marshaledText, err := h.Set.MarshalText()
	must(t, err)
	shown := []string{
		text.String(), structured.String(), string(marshaled), string(marshaledText),
		h.Set.String(), fmt.Sprint(h.Set),
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%q", "%s", "%x", "% X", "%d", "%10.3s", "%t", "%U"} {
		for _, value := range []any{h, &h, h.Set, []secret{h.Set}, map[secret]int{h.Set: 1}} {
			shown = append(shown, fmt.Sprintf(format, value))
		}
	}
	for _, got := range shown {
		if strings.Contains(got, "hunter2") || !strings.Contains(got, "[redacted]") {
			t.Errorf("got %s", got)
		}
	}
	if got, want := string(marshaled), `{"Set":"[redacted]","Unset":""}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := fmt.Sprintf("%v%#v%d", h.Unset, h.Unset, h.Unset), ""; got != want {
		t.Errorf("unset: got %q, want %q", got, want)
	}
}

func TestNewLogger(t *testing.T) {
	tests := []struct{ level, format, want string }{
		{"", "", "level=INFO msg=m\nlevel=WARN msg=m\nlevel=ERROR msg=m\n"},
		{"debug", "text", "level=DEBUG msg=m\nlevel=INFO msg=m\nlevel=WARN msg=m\nlevel=ERROR msg=m\n"},
		{"warn", "json", `{"level":"WARN","msg":"m"}` + "\n" + `{"level":"ERROR","msg":"m"}` + "\n"},
		{"error", "", "level=ERROR msg=m\n"},
	}
	for _, test := range tests {
		var got bytes.Buffer
		logger, err := newLogger(getenvFrom(map[string]string{"LOG_LEVEL": test.level, "LOG_FORMAT": test.format}), &got)
		must(t, err)
		for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
			record := slog.NewRecord(time.Time{}, level, "m", 0) // without a time, none is written
			if logger.Enabled(t.Context(), level) {
				must(t, logger.Handler().Handle(t.Context(), record))
			}
		}
		if got.String() != test.want {
			t.Errorf("%q, %q: got %s, want %s", test.level, test.format, got.String(), test.want)
		}
	}
}

// The gateway listens where it is told, and nowhere else.
func TestGatewayHost(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]string{"127.0.0.1": "127.0.0.1", "::1": "::1", "localhost": "127.0.0.1", "": "::"} {
		cfg, err := loadGatewayConfig(getenvFrom(map[string]string{"HOST": host, "PORT": "0"}))
		must(t, err)
		servers, err := openServers(slog.New(slog.DiscardHandler), newRegistry("test"), []string{cfg.Addr}, nil)
		if err != nil && os.Getenv("CI") == "" {
			t.Skipf("HOST=%s: %v", host, err)
		}
		must(t, err)
		listener := servers[0].listener
		defer listener.Close()
		if got, _, _ := net.SplitHostPort(listener.Addr().String()); got != want {
			t.Errorf("HOST=%s: listens on %s, want %s", host, got, want)
		}
	}
}

// A misspelt setting has no effect, so it is logged. Variables of other programs or of Kubernetes are not.
func TestMisspeltVariables(t *testing.T) {
	t.Parallel()
	environ := []string{
		"TASK_MAX_WORKER=hunter2", "SSE_CALLBACK_SECRETS=hunter2", "DATA_DIRECTORY=hunter2", "HEARTBEAT_INTERVAL=hunter2", "MAX_STREAM=hunter2",
		"TASK_MAX_WORKERS=4", "CALLBACK_URL=http://h/", "HEARTBEAT_INTERVAL_SECONDS=15", "CORS_ALLOW_ORIGIN=*", "INTERNAL_ADDR=",
		"PATH=/bin", "HOME=/", "LOG_DIR=/", "API_KEY=x", "APP_NAME=x", "TASKS=1", "MY_TASK_LIMIT=1", "task_max_worker=1", "=x", "TASK_",
		"SSE_GATEWAY_PORT=tcp://10.0.0.1:3000", "SSE_GATEWAY_SERVICE_HOST=10.0.0.1", "SSE_GATEWAY_SERVICE_PORT_HTTP=3000",
		"FRONTEND_PORT_80_TCP_ADDR=10.0.0.1",
	}
	for _, args := range [][]string{nil, {"gateway"}} {
		var out bytes.Buffer
		bad := map[string]string{"ADDR": "192.0.2.1:1", "HOST": "192.0.2.1", "PORT": "1"} // not ours, so it ends at once
		run(t.Context(), args, getenvFrom(bad), io.Discard, &out, environ...)
		var got []string
		for _, m := range regexp.MustCompile(`level=WARN msg="no such setting: is its name misspelt\?" variable=(\S*)`).FindAllStringSubmatch(out.String(), -1) {
			got = append(got, m[1])
		}
		want := []string{"TASK_MAX_WORKER", "SSE_CALLBACK_SECRETS", "DATA_DIRECTORY", "HEARTBEAT_INTERVAL", "MAX_STREAM", "TASK_"}
		if !slices.Equal(got, want) || strings.Contains(out.String(), "hunter2") {
			t.Errorf("sidecast %v: got %q in %s, want %q and no value", args, got, &out, want)
		}
	}
}

func TestHealthcheckURL(t *testing.T) {
	const noPort = " must be given a port above 0 for a health check, " +
		"which cannot know the port that the system chose, not "
	for settings, want := range map[string]string{
		"HOST=127.0.0.9 PORT=3000":                  "http://127.0.0.9:3000/readyz",
		"HOST=::1 PORT=3000":                        "http://[::1]:3000/readyz",
		"HOST=:: PORT=3000":                         "http://127.0.0.1:3000/readyz",
		"HOST=0.0.0.0 PORT=3000":                    "http://127.0.0.1:3000/readyz",
		"HOST=localhost PORT=3000":                  "http://127.0.0.1:3000/readyz",
		"ADDR=localhost:9 HOST=192.0.2.7 PORT=3000": "http://127.0.0.1:9/readyz",
		"":                           "http://127.0.0.1:8080/readyz",
		"PORT=3000":                  "http://127.0.0.1:3000/readyz",
		"ADDR=localhost:9 PORT=3000": "http://127.0.0.1:9/readyz",
		"ADDR=192.0.2.7:80":          "http://192.0.2.7:80/readyz",
		"ADDR=[::1]:80":              "http://[::1]:80/readyz",
		"ADDR=[fe80::1%eth0]:80":     "http://[fe80::1%25eth0]:80/readyz",
		"ADDR=:8080":                 "http://127.0.0.1:8080/readyz",
		"ADDR=0.0.0.0:8080":          "http://127.0.0.1:8080/readyz",
		"ADDR=[::]:8080":             "http://127.0.0.1:8080/readyz",
		"ADDR=localhost":             `ADDR must be host:port with a port from 0 to 65535, not "localhost"`,
		"PORT=x":                     `PORT must be a whole number from 0 to 65535, not "x"`,
		"PORT=0":                     "PORT" + noPort + `"0"`,
		"ADDR=:00":                   "ADDR" + noPort + `":00"`,
	} {
		got, err := healthcheckURL(getenvFrom(settingsEnv(settings)))
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: got %s, want %s", settings, got, want)
		}
	}
}
