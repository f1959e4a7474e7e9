-- In place of lighttpd's own errors while the gateway restarts: an EventSource gives up for good on any status but 200, or
-- without CORS headers if its page is of another site, and comes back by itself after a stream that ends.
local r = lighty.r
if r.req_item["http_status"] < 500 or r.resp_header["Content-Type"] == "application/json" then
    return 0 -- the gateway's own answer
end
r.resp_header["Content-Type"] = "text/event-stream"
r.resp_header["Cache-Control"] = "no-store"
r.resp_header["Access-Control-Allow-Origin"] = r.req_header["Origin"]
r.resp_header["Access-Control-Allow-Credentials"] = "true"
r.resp_body.set("retry: 3000\n: gateway is away\n")
return 200
