"""As much of an S3 client as uploading takes: requests that are signed (AWS Signature Version 4)."""

import datetime
import hashlib
import hmac
import http.client
import urllib.parse


class Client:
    """Asks one endpoint, which is plain HTTP."""

    def __init__(self, endpoint, region, key):
        self._host = urllib.parse.urlsplit(endpoint).netloc
        self._region, (self._id, self._secret) = region, key

    def put(self, bucket, key, data):
        """Makes or replaces an object; gives the status and what was said."""
        path = urllib.parse.quote(f"/{bucket}/{key}")
        connection = http.client.HTTPConnection(self._host, timeout=120)
        connection.request("PUT", path, body=data, headers=self._headers("PUT", path, data))
        answer = connection.getresponse()
        said = answer.read().decode(errors="replace")
        connection.close()
        return answer.status, said

    def _headers(self, method, path, data):
        now = datetime.datetime.now(datetime.timezone.utc)
        day, stamp = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
        content = hashlib.sha256(data).hexdigest()
        signed = {"host": self._host, "x-amz-content-sha256": content, "x-amz-date": stamp}
        names = ";".join(signed)
        headers = "".join(f"{name}:{value}\n" for name, value in signed.items())
        canonical = "\n".join([method, path, "", headers, names, content])
        scope = f"{day}/{self._region}/s3/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = f"AWS4{self._secret}".encode()
        for part in (day, self._region, "s3", "aws4_request", text):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        authorization = f"AWS4-HMAC-SHA256 Credential={self._id}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
        return {**signed, "authorization": authorization}
